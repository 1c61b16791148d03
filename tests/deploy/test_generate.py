"""``slope generate`` and what it is made of."""

from __future__ import annotations

import json
import re

import pytest
import torch
from transformers import StaticCache

import slope
from slope import cli
from slope.deploy import Sampling, generate
from slope.evaluation import sample

PROMPTS = ["the history of the city", "a", "", "the river and the king is"]
GREEDY = Sampling(max_new_tokens=8, temperature=0)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_batch_gives_what_each_prompt_gives_without_a_cache(make_model, tokenizer, family):
    model = make_model(family)
    batch = generate(model, tokenizer, PROMPTS, GREEDY)
    for prompt, text, tokens in zip(PROMPTS, batch.texts, batch.tokens, strict=True):
        one = generate(model, tokenizer, [prompt], GREEDY)
        assert (one.texts, one.tokens) == ([text], [tokens])
        assert prompt + text == sample(model, tokenizer, prompt, 8, temperature=0)
    assert batch.tokens_per_second == sum(batch.tokens) / batch.seconds


def test_the_cache_is_static(make_model, tokenizer, monkeypatch):
    model = make_model()
    seen, update = [], StaticCache.update

    def counted(self, keys, values, layer, *args, **kwargs):
        seen.append((id(self), layer))
        return update(self, keys, values, layer, *args, **kwargs)

    monkeypatch.setattr(StaticCache, "update", counted)
    generate(model, tokenizer, ["the"], GREEDY)
    layers = model.config.num_hidden_layers
    assert len({cache for cache, _ in seen}) == 1
    assert [layer for _, layer in seen] == [*range(layers)] * (len(seen) // layers)
    assert 0 < len(seen) <= 8 * layers


def test_text_is_streamed_and_a_seed_repeats_it(make_model, tokenizer):
    model, pieces = make_model(), []
    state = torch.get_rng_state()
    sampling = Sampling(max_new_tokens=12, temperature=1.5, top_k=0, top_p=0.9, seed=3)
    done = generate(model, tokenizer, ["the city"], sampling, pieces.append)
    assert pieces[0] == "the city" and "".join(pieces[1:]) == done.texts[0]
    assert generate(model, tokenizer, ["the city"], sampling).texts == done.texts
    assert torch.equal(torch.get_rng_state(), state)
    other = Sampling(max_new_tokens=12, temperature=1.5, top_k=0, top_p=0.9, seed=4)
    assert generate(model, tokenizer, ["the city"], other).texts != done.texts


def test_settings_that_came_with_the_model_do_not_steer(make_model, tokenizer):
    model = make_model()
    expected = generate(model, tokenizer, PROMPTS, GREEDY).texts
    model.generation_config.num_beams = model.generation_config.num_return_sequences = 2
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.no_repeat_ngram_size = 1
    assert generate(model, tokenizer, PROMPTS, GREEDY).texts == expected
    assert generate(model, tokenizer, ["a"], GREEDY, lambda text: None).texts == expected[1:2]


def test_a_folded_model_says_the_same(make_model, tokenizer):
    model = make_model("llama")
    sparse = generate(model, tokenizer, PROMPTS, GREEDY)
    folded = generate(slope.densify(model, fold_adapters=True), tokenizer, PROMPTS, GREEDY)
    assert folded.texts == sparse.texts


def test_the_context_is_a_limit(make_model, tokenizer):
    model = make_model()
    long = "the city " * 40
    with pytest.raises(
        ValueError,
        match=r"prompt 2 \('the city .*'…\) has \d+ tokens, and the model's context holds",
    ):
        generate(model, tokenizer, ["the", long], GREEDY)
    size = len(tokenizer("the city")["input_ids"])
    message = (
        rf"prompt 1 .* has {size} tokens; with 32 new ones .* type --max-new-tokens {32 - size}, or"
    )
    with pytest.raises(ValueError, match=message):
        generate(model, tokenizer, ["the city"], Sampling(max_new_tokens=32))
    assert generate(model, tokenizer, ["the city"]).tokens[0] <= 32 - size


def test_a_model_that_cannot_generate_and_a_tokenizer_without_an_end(make_model, tokenizer):
    with pytest.raises(ValueError, match="BertForMaskedLM is no causal language model"):
        generate(make_model("bert"), tokenizer, ["a"])
    with pytest.raises(ValueError, match="gives no token and the tokenizer has no end-of-text"):
        bare = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
        generate(make_model(), bare, [""])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be 1 or more"),
        ({"temperature": -1}, "temperature=-1 must be 0"),
        ({"top_k": -1}, "top_k=-1 must be 0"),
        ({"top_p": 0}, "top_p=0 must be above 0"),
    ],
)
def test_options_out_of_range(option, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**option)


# --- the command -------------------------------------------------------------------------------


def test_one_prompt_is_streamed_and_the_speed_is_on_stderr(make_run, capsys, tokenizer):
    model = make_run()
    arguments = ["--prompt", "the city", "--max-new-tokens", "6", "--temperature", "0"]
    assert cli.main(["generate", "mine", *arguments]) == 0
    captured = capsys.readouterr()
    assert captured.out == sample(model, tokenizer, "the city", 6, temperature=0) + "\n"
    assert captured.err.endswith(" tokens/s on cpu\n") and "6 tokens in " in captured.err


def test_prompts_of_a_file_as_json(make_run, here, capsys, tokenizer):
    model = make_run()
    (here / "prompts.txt").write_text("the city\n\na king\nthe music\n")
    arguments = ["--prompts-file", "prompts.txt", "--batch-size", "2", "--max-new-tokens", "4"]
    assert cli.main(["generate", "mine", *arguments, "--temperature", "0", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [result["prompt"] for result in found["results"]] == ["the city", "a king", "the music"]
    for result in found["results"]:
        whole = sample(model, tokenizer, result["prompt"], 4, temperature=0)
        assert result["prompt"] + result["text"] == whole
    assert found["tokens"] == sum(result["tokens"] for result in found["results"])
    assert found["tokens_per_second"] > 0 and found["dtype"] == "float32"
    assert cli.main(["generate", "mine", *arguments, "--fold", "--dtype", "bfloat16"]) == 0
    assert capsys.readouterr().out.count("\n\n") == 3


def results(capsys, *arguments):
    assert cli.main(["generate", "mine", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)["results"]


def test_batches_have_draws_of_their_own(make_run, here, capsys):
    make_run()
    (here / "prompts.txt").write_text("the king\n" * 6)
    arguments = ("--prompts-file", "prompts.txt", "--batch-size", "2", "--temperature", "2")
    texts = [result["text"] for result in results(capsys, *arguments)]
    assert len(set(texts)) == 6
    assert [result["text"] for result in results(capsys, *arguments)] == texts
    further = results(capsys, *arguments, "--seed", "1")
    assert not {result["text"] for result in further} & set(texts)
    # The first batch has the seed itself.
    (here / "prompts.txt").write_text("the king\n" * 2)
    assert [result["text"] for result in results(capsys, *arguments)] == texts[:2]


def test_how_long_a_text_may_become_does_not_depend_on_the_prompts_beside_it(
    make_run, here, capsys, tokenizer
):
    make_run("mine", "model.config.n_positions=32")
    prompts = ["the king", "the river", "the city and the king of a war and a war", "the music"]
    (here / "prompts.txt").write_text("\n".join(prompts))
    found = results(capsys, "--prompts-file", "prompts.txt", "--temperature", "0")
    assert [result["prompt"] for result in found] == prompts
    for prompt, result in zip(prompts, found, strict=True):
        assert result["tokens"] <= 32 - len(tokenizer(prompt)["input_ids"])
        assert results(capsys, "--prompt", prompt, "--temperature", "0") == [result]


def test_what_is_not_given_has_the_defaults_of_the_help(make_run, capsys):
    make_run()
    given = ("--temperature", "0.8", "--top-k", "50", "--top-p", "1", "--seed", "0")
    prompts = ("--prompt", "the king", "--prompt", "a")
    assert results(capsys, *prompts) == results(capsys, *prompts, *given, "--batch-size", "8")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["mine"], 2, "give --prompt TEXT or --prompts-file FILE"),
        (["mine", "--prompt", "a", "--top-p", "2"], 2, "top_p=2.0 must be above 0"),
        (["mine", "--prompt", "a", "--batch-size", "0"], 2, "--batch-size 0 must be at least 1"),
        (["mine", "--prompt", "a", "--batch-size", "4"], 2, "--batch-size goes with several prom"),
        (
            ["mine", "--prompt", "a", "--temperature", "0", "--top-k", "5"],
            2,
            "--top-k goes with a --temperature above 0",
        ),
        (
            ["mine", "--prompt", "a", "--temperature", "0", "--top-p", "0.5"],
            2,
            "--top-p goes with a --temperature above 0",
        ),
        (["mine", "--prompts-file", "none.txt"], 1, "no file 'none.txt' with prompts"),
        (["mine", "--prompts-file", "empty.txt"], 1, "'empty.txt' holds no prompt"),
        (
            ["none", "--prompt", "a", "--device", "fast"],
            2,
            "--device: 'fast' is no device; type cpu",
        ),
        (["none", "--prompt", "a", "--prompts-file", "f"], 2, "or --prompts-file FILE, not both"),
        (["other", "--prompt", "a"], 1, "no checkpoint other; give the name of a run, .*: bare, m"),
        (["bare", "--prompt", "a"], 1, "comes without a tokenizer; type --tokenizer"),
        (["mine", "--prompt", "the " * 40], 1, "shorten the prompt"),
    ],
)
def test_what_can_be_wrong(make_run, here, capsys, arguments, code, message):
    make_run()
    make_run("bare", with_tokenizer=False)
    (here / "empty.txt").write_text("\n\n")
    assert cli.main(["generate", *arguments]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = [line for line in captured.err.splitlines() if "error:" in line]
    assert re.search(message, line), line
