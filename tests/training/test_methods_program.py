"""Whole runs of every method: exact resume, what a checkpoint may go on as, trained weights."""

from __future__ import annotations

import json
from itertools import islice

import pytest
import torch
from tiny_runs import Runs, assert_equal

import slope
from slope.configs import compose
from slope.data import BatchLoader, prepare
from slope.export.dense import save_dense
from slope.linear import AdaptedLinear
from slope.methods import PrunedLinear
from slope.models import build_model
from slope.training import initial, program

SHORT = ("trainer.max_steps=10", "trainer.val_check_interval=5",
         "callbacks.checkpoint.save_top_k=0",
         "callbacks.checkpoint.every_n_steps=10", "callbacks.checkpoint.progress_every_n_steps=4",
         "plot=false")  # fmt: skip
METHODS = {
    "extended-sr-ste": (
        "pruner=extended-sr-ste",
        "pruner.srste_decay=2e-4",
        "pruner.add_lora=True",
    ),
    "fst": ("pruner=fst", "pruner.mask_interval=3", "pruner.dense_start=0.7"),
    "s-ste": ("pruner=s-ste",),
    "static-input": ("pruner.pruned_matrix=static-input",),
    "dynamic-output-grad": ("pruner.pruned_matrix=dynamic-output-grad",),
    "along-d_out": ("pruner.reduction_dim=False",),
    "unstructured": ("pruner.unstructured_masking=True",),
    "transposable": ("pruner.mask=transposable",),
    "evolving": ("pruner.evolve_interval=2", "pruner.evolve_stop=0.9", "pruner.add_lora=False"),
    "from-step-0": ("pruner.lora_lazy=False", "pruner.lora_schedule=model"),
}
# Their forward is a dense weight, with or without zeros, at the end of the run.
WEIGHTS = ("extended-sr-ste", "fst", "s-ste", "along-d_out", "unstructured", "evolving",
           "from-step-0")  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory, corpus):
    """Runs that tests share; each is done when it is first asked for."""
    runs = Runs(tmp_path_factory.mktemp("trained"), corpus)
    runs.summaries = {}

    def ask(name):
        if name not in runs.summaries:
            chosen = ("pruner=none",) if name == "dense" else METHODS[name]
            runs.summaries[name] = runs.run(f"name={name}", *SHORT, *chosen)
        return runs.summaries[name]

    runs.ask = ask
    return runs


@pytest.mark.parametrize("name", METHODS)
def test_stopped_and_resumed_is_as_unbroken(trained, name):
    trained.ask(name)
    whole, rows = trained.last(name), trained.exact_rows(name)
    trained.run(f"name={name}", *SHORT, *METHODS[name], "resume=True", "resume_iter=4")
    again = trained.last(name)
    for key in ("global_step", "state_dict", "optimizer_states"):
        assert_equal(whole[key], again[key], key)
    assert_equal(whole["slope"]["rng"], again["slope"]["rng"], "rng")
    assert trained.exact_rows(name) == rows


def test_an_evolving_mask_evolves(trained):
    trained.ask("evolving")
    folder = trained.checkpoints("evolving")
    early, late = (torch.load(folder / name, weights_only=True)["state_dict"]
                   for name in ("progress_step_4.ckpt", "last.ckpt"))  # fmt: skip
    names = [name for name in early if name.endswith("metadata")]
    assert names and not all(torch.equal(early[name], late[name]) for name in names)


def test_adapters_from_step_0(trained):
    summary = trained.ask("from-step-0")
    rows = trained.rows("from-step-0")
    assert summary["adapters_started_at_step"] == 0
    assert {row["adapters_active"] for row in rows} == {"1"}
    tenth = [pytest.approx(float(row["lr"]) / 10) for row in rows]
    assert [float(row["lora_lr"]) for row in rows] == tenth


def test_summary_of_dense_weights_under_a_method(trained):
    summary, dense = trained.ask("extended-sr-ste"), trained.ask("dense")
    assert summary["parameters_dense"] == dense["parameters_dense"]
    # Rank 4: two c_proj of 32 x 32, two c_fc and two mlp.c_proj of 32 x 128, block 1's c_attn.
    adapters = 4 * (2 * (32 + 32) + 4 * (32 + 128) + (32 + 96))
    assert summary["parameters_stored"] == summary["parameters_dense"] + adapters
    assert summary["weight_bytes_sparse_layers"] == summary["weight_bytes_dense_equivalent"] > 0
    logs = trained.root / "logs" / "extended-sr-ste"
    written = json.loads((logs / "summary.json").read_text())
    assert written["parameters_stored"] == summary["parameters_stored"]
    assert "dynamic-weight" in (logs / "report.txt").read_text()


@pytest.mark.parametrize(
    ("name", "overrides", "text"),
    [
        ("extended-sr-ste", ["pruner.add_lora=True"],
         "method of .*c_proj is 'dynamic-weight' in it and 'static-weight' here"),
        ("extended-sr-ste", [*METHODS["extended-sr-ste"], "pruner.reduction_dim=False"],
         "is 'dynamic-weight' in it and 'dynamic-weight, prune_backward=False' here"),
        ("along-d_out", [], "is 'static-weight along d_out' in it and 'static-weight' here"),
        ("unstructured", ["pruner.unstructured_masking=True",
                          "pruner.unstructured_mask_sparsity=50"],
         "pattern of .* is '60%' in it and '50%' here"),
        ("evolving", ["pruner.prune_backward=False"],
         "is 'static-weight' in it and 'static-weight, prune_backward=False' here"),
    ],
)  # fmt: skip
def test_a_checkpoint_of_another_method_is_refused(trained, name, overrides, text):
    trained.ask(name)
    with pytest.raises(ValueError, match=f"{name}/last.ckpt is of another model: .*{text}"):
        trained.run(f"name={name}", *SHORT, "resume=True", *overrides)


# -- trained weights -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*WEIGHTS, "dense"])
def test_a_run_starts_from_the_weights_that_another_ended_with(trained, name):
    """Also where the forward's weight is not the stored one, and where adapters are folded in."""
    trained.ask(name)
    ended = trained.rows(name)[-1]["val/loss"]
    start = f"init_from={trained.checkpoints(name)}"
    frozen = ("trainer.max_steps=1", "train.optimizer.lr=1e-30", "pruner=none", "plot=false")
    summary = trained.run(f"name=from-{name}", start, *frozen)
    assert summary["val_loss"] == pytest.approx(float(ended), rel=1e-6)
    text = (trained.root / "logs" / f"from-{name}" / "run.log").read_text()
    assert f"starts from the weights of {trained.checkpoints(name)}/last.ckpt" in text


def gpt2(trained):
    trained.ask("dense")
    vocabulary = trained.last("dense")["slope"]["signature"]["vocabulary"]
    return build_model(trained.config().model, vocabulary, 32)


def test_zeros_of_a_sparse_run_stay_zeros(trained):
    trained.ask("evolving")
    model = gpt2(trained)
    initial.load_into(model, initial.read(trained.checkpoints("evolving") / "last.ckpt"))
    weight = model.transformer.h[1].mlp.c_fc.weight  # Conv1D: (d_in, d_out)
    assert weight.requires_grad and model.training
    assert (weight != 0).unflatten(0, (-1, 4)).sum(1).le(2).all()


@pytest.mark.parametrize("writer", ["slope", "hf", "transformers"])
def test_an_exported_folder_is_a_start(trained, tmp_path, writer):
    torch.manual_seed(0)
    model = gpt2(trained).eval()
    if writer != "transformers":
        slope.sparsify(model, slope.SparsityConfig(adapter_rank=4))
        slope.activate_adapters(model)
        with torch.no_grad():
            for parameter in slope.adapter_parameters(model):
                parameter.normal_()
        (slope.save_pretrained if writer == "slope" else save_dense)(model, tmp_path / "out")
    else:
        model.save_pretrained(tmp_path / "out")
    other = gpt2(trained)
    sparse = initial.load_into(other, initial.read(tmp_path / "out"))
    assert (sparse is not None) == (writer == "slope")
    assert not any(isinstance(module, AdaptedLinear) for module in other.modules())
    assert other.lm_head.weight is other.transformer.wte.weight
    ids = torch.arange(64).view(2, 32)
    torch.testing.assert_close(other.eval()(ids).logits, model(ids).logits)
    if writer == "hf":
        (tmp_path / "out" / "adapter" / "adapter_config.json").unlink()
        with pytest.raises(FileNotFoundError, match=r"config\.json' is missing; the folder is inc"):
            initial.load_into(gpt2(trained), initial.read(tmp_path / "out"))


def test_a_finished_run_that_is_resumed_writes_the_same_sample(trained):
    """Its model is put into the state of its last step: FST's is dense then."""
    for name in ("fst", "from-step-0"):
        trained.ask(name)
        sample = trained.root / "logs" / name / "sample.txt"
        text = sample.read_text()
        trained.run(f"name={name}", *SHORT, *METHODS[name], "resume=True")
        assert sample.read_text() == text


def test_masks_of_trained_weights(trained):
    """One-shot magnitude and Wanda masks, the same however often they are chosen."""
    trained.ask("dense")
    start = (f"init_from={trained.checkpoints('dense')}", "trainer.max_steps=1",
             "pruner.add_lora=False", "plot=false")  # fmt: skip
    masks = {}
    for name, mask in (("one", "magnitude"), ("two", "wanda"), ("three", "wanda")):
        trained.run(f"name={name}", *start, f"pruner.mask={mask}")
        state = trained.last(name)["state_dict"]
        masks[name] = [state[key] for key in state if key.endswith("metadata")]
    assert all(torch.equal(a, b) for a, b in zip(masks["two"], masks["three"], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(masks["one"], masks["two"], strict=True))
    # A resumed run has its masks from the checkpoint, and needs the old weights no more.
    moved = trained.run("name=two", "resume=True", "trainer.max_steps=2", "pruner.mask=wanda",
                        "init_from=gone", "pruner.add_lora=False", "plot=false")  # fmt: skip
    assert moved["steps"] == 2


def test_calibration_reads_the_first_training_batches(trained):
    cfg = trained.config("pruner.mask=wanda", "pruner.calibration_batches=3")
    data = prepare(cfg.datamodule, progress=False)
    batches = list(program._calibration(cfg, data))
    loader = BatchLoader(data.train, 4, seed=1111, shuffle=True)
    assert len(batches) == 3
    for found, expected in zip(batches, islice(loader, 3), strict=True):
        assert_equal(found, expected, "batch")


@pytest.mark.parametrize(
    ("overrides", "error", "text"),
    [
        (["pruner.mask=wanda"], ValueError,
         "pruner.mask=wanda with init_from=null has no meaning: .*choose pruner.mask=magnitude, or "
         "init_from=<a checkpoint"),
        (["init_from=nowhere"], FileNotFoundError, "init_from=nowhere does not exist; give a chec"),
        (["init_from=."], FileNotFoundError, "init_from=. holds nothing to start from; give a ch"),
        (["init_from={dense}", "model.config.n_layer=3"], ValueError,
         r"init_from=.*last.ckpt does not fit this model: transformer.h.2.attn.c_attn.bias is "
         r"absent in it and \(96,\) here; .*; and \d+ more. Start from weights of the same model="),
        (["init_from={dense}", "model.config.n_embd=64"], ValueError,
         r"does not fit this model: .* is \(512, 32\) in it and \(512, 64\) here|is \(32, 96\) in"),
        (["init_from={evolving}", "model.config.n_embd=36"], ValueError, "does not fit this model"),
        (["pruner.accelerate=True"], ValueError,
         "pruner.accelerate=True with trainer.accelerator=cpu: device type 'cpu' has no sparse"),
        (["pruner.sparsity_increment=2"], ValueError, "block 2 is beyond the last block"),
        (["pruner.rules=[['*.mlp.*','2:32']]", "model.config.n_embd=48"], ValueError,
         r"not divisible by m=32 of pattern 2:32 \(layer 'transformer.h.0.mlp.c_fc'\); keep it "
         r"dense with pruner.rules="),
    ],
)  # fmt: skip
def test_bad_input_before_any_work(trained, tmp_path, monkeypatch, overrides, error, text):
    monkeypatch.chdir(tmp_path)
    for name in ("dense", "evolving"):
        trained.ask(name)
    folders = {name: trained.checkpoints(name) for name in ("dense", "evolving")}
    filled = [override.format(**folders) for override in overrides]
    with pytest.raises(error, match=text):
        trained.run("name=bad", *filled)
    assert not (trained.root / "logs" / "bad").exists()
    assert not (trained.root / "checkpoints" / "bad").exists()


def test_check_sees_missing_weights_and_leaves_a_begun_run_alone(trained):
    with pytest.raises(FileNotFoundError, match="init_from=nowhere does not exist"):
        program.check(trained.config("name=new", "init_from=nowhere"))
    trained.ask("dense")
    program.check(trained.config("name=dense", "init_from=nowhere"))


def test_layers_of_each_method_are_of_one_kind(trained):
    """The program's own way from the options to the model."""
    for name, overrides in METHODS.items():
        model = gpt2(trained)
        cfg = compose(["experiment=smoke", *overrides])
        program.pruner.apply(cfg.pruner, model)
        kinds = {type(module) for module in model.modules()} & {slope.SlopeLinear, PrunedLinear}
        compressed = name in ("transposable", "evolving", "from-step-0")
        assert kinds == ({slope.SlopeLinear} if compressed else {PrunedLinear}), name
