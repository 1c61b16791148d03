"""Every experiment composes, its model can be built, and mistakes are named."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError

import slope
from slope import configs
from slope.configs import ranges
from slope.models import build_model, structure
from slope.training.pruner import sparsity_config

FOLDER = Path(configs.__file__).parent
EXPERIMENTS = configs.choices("experiment")
PUBLISHED = (  # the words of the published command, one by one
    "experiment=owt/gpt2s", "trainer.devices=8", "datamodule.batch_size=16",
    "trainer.num_nodes=2", "name=my-run", "resume=True", "logger=csv", "optimizer=adamw",
    "pruner.pruned_matrix=static-weight", "pruner.skip_attention=False",
    "pruner.skip_first_block=False", "pruner.skip_last_block=False", "pruner.reduction_dim=True",
    "pruner.add_lora=True", "pruner.lora_rank=16", "trainer.max_steps=400000",
)  # fmt: skip
SIZES = {  # (width, blocks, heads)
    "owt/gpt2s": (768, 12, 12),
    "owt/gpt2m": (1024, 24, 16),
    "owt/gpt2l": (1280, 36, 20),
    "owt/gpt2xl": (1600, 48, 25),
    "pile/gpt3s": (768, 12, 12),
    "pile/gpt3m": (1024, 24, 16),
    "pile/gpt3l": (1536, 24, 16),
    "pile/gpt3xl": (2048, 24, 16),
    "pile/gpt3-2.7B": (2560, 32, 32),
    "c4/opt-125m": (768, 12, 12),
    "c4/opt-350m": (1024, 24, 16),
    "c4/opt-1.3b": (2048, 24, 32),
    "c4/opt-2.7b": (2560, 32, 32),
    "c4/opt-6.7b": (4096, 32, 32),
    "c4/opt-13b": (5120, 40, 40),
    "c4/opt-30b": (7168, 48, 56),
    "c4/opt-66b": (9216, 64, 72),
    "c4/llama3-8b": (4096, 32, 32),
    "c4/mistral-7b": (4096, 32, 32),
    "bert/phase1": (1024, 24, 16),
    "bert/phase2": (1024, 24, 16),
    "bert/large": (1024, 24, 16),
    "bert/base": (768, 12, 12),
}


def test_all_published_experiments_exist() -> None:
    gpt2 = [f"owt/gpt2{size}" for size in ("s", "m", "l", "xl")]
    aliases = [f"{name}-{kind}" for name in gpt2 for kind in ("flash", "hf")]
    single = set(EXPERIMENTS) - set(configs.comparisons())
    assert single == {*SIZES, *aliases, "demo", "smoke", "bert/demo", "bert/demo2"}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiment_composes_and_its_numbers_fit(experiment: str) -> None:
    cfg = configs.compose([f"experiment={experiment}", "pruner=slope"])
    assert cfg.name == experiment.replace("/", "-")
    per_step = cfg.train.global_batch_size
    assert per_step % cfg.datamodule.batch_size == 0
    if experiment in SIZES:
        assert per_step % (8 * cfg.datamodule.batch_size) == 0  # the command in the file
    assert cfg.train.scheduler.name in ("linear_warmup", "cosine_warmup", "polynomial_warmup")
    assert cfg.trainer.val_check_interval <= cfg.trainer.max_steps
    text = (FOLDER / "experiment" / f"{experiment}.yaml").read_text()
    assert re.search(rf"^#.*experiment={re.escape(experiment)}", text, re.M)


# Two of one shape would build the same thing: aliases are compared as configurations below.
@pytest.mark.parametrize(
    "experiment", [name for name in EXPERIMENTS if not name.endswith(("-flash", "-hf"))]
)
def test_experiment_builds_and_sparsifies_on_the_meta_device(experiment: str) -> None:
    cfg = configs.compose([f"experiment={experiment}", "pruner=slope"])
    tokenizer = str(cfg.datamodule.tokenizer)
    kind, _, size = tokenizer.partition(":")
    vocabulary = int(size or {"gpt2": 50257, "bert-uncased": 30522}[kind])
    with torch.device("meta"):
        model = build_model(cfg.model, vocabulary, cfg.datamodule.max_length)
        if experiment in SIZES:
            config = model.config
            size = (config.hidden_size, config.num_hidden_layers, config.num_attention_heads)
            assert size == SIZES[experiment]
        settings = sparsity_config(cfg.pruner, model)
        parts = structure(model)
        report = slope.sparsify(model, settings)
    dense = {layer.name: layer.reason for layer in report.layers if layer.pattern is None}
    assert set(dense) == {parts.head, *parts.first_qkv, *parts.outside}
    assert all(dense.values())


@pytest.mark.parametrize("size", ["s", "m", "l", "xl"])
@pytest.mark.parametrize("kind", ["flash", "hf"])
def test_alias_is_the_experiment_it_names(size: str, kind: str) -> None:
    alias = configs.compose([f"experiment=owt/gpt2{size}-{kind}", "name=x"])
    assert alias == configs.compose([f"experiment=owt/gpt2{size}", "name=x"])


def test_published_command_composes_word_for_word() -> None:
    cfg = configs.compose(PUBLISHED)
    assert (cfg.trainer.devices, cfg.trainer.num_nodes, cfg.trainer.max_steps) == (8, 2, 400_000)
    assert (cfg.datamodule.dataset, cfg.datamodule.batch_size) == ("openwebtext", 16)
    assert (cfg.name, cfg.resume, cfg.logger, cfg.seed) == ("my-run", True, "csv", 1111)
    assert cfg.pruner.pruned_matrix == "static-weight"
    assert (cfg.pruner.add_lora, cfg.pruner.lora_rank, cfg.pruner.lora_start) == (True, 16, 0.99)
    assert cfg.pruner.skip_attention is False
    assert cfg.pruner.reduction_dim is True
    assert OmegaConf.to_container(cfg.train, resolve=True) == {
        "global_batch_size": 512,
        "optimizer": {
            "name": "adamw", "lr": 6e-4, "betas": [0.9, 0.999], "eps": 1e-4, "weight_decay": 0.1,
        },
        "scheduler": {
            "name": "linear_warmup", "warmup_steps": None, "warmup_ratio": 0.01,
            "min_lr_ratio": 0.0,
        },
    }  # fmt: skip
    assert cfg.paths.log_dir == "./logs/my-run"
    assert cfg.model.config.scale_attn_by_inverse_layer_idx is True
    assert (cfg.trainer.gradient_clip_val, cfg.trainer.val_check_interval) == (1.0, 1000)


def test_group_and_value_overrides_of_the_optimizer() -> None:
    cfg = configs.compose(
        ["experiment=owt/gpt2m", "optimizer=adamw-zero", "train.global_batch_size=64"]
    )
    assert (cfg.train.optimizer.name, cfg.train.optimizer.lr) == ("adamw-zero", 1.5e-4)
    assert cfg.train.global_batch_size == 64
    cfg = configs.compose(["experiment=owt/gpt2m", "train.optimizer.lr=1e-3", "seed=1"])
    assert (cfg.train.optimizer.lr, cfg.pruner.mask_seed) == (1e-3, 1)


@pytest.mark.parametrize("text", ["True", "true", "TRUE"])
def test_booleans_of_python_and_yaml(text: str) -> None:
    assert configs.compose([f"resume={text}"]).resume is True


def test_tree_is_closed_but_plus_opens_it() -> None:
    cfg = configs.compose(["+mine.deep=3"])
    assert cfg.mine.deep == 3
    with pytest.raises(ConfigAttributeError):
        _ = cfg.trainer.nothing


def test_values_keep_their_kind() -> None:
    cfg = configs.compose(
        ["trainer.max_steps=4e5", "name=2024", "pruner.lora_rank=0.0156", "trainer.precision=16",
         "trainer.devices=auto", "pruner.rules=[['*.mlp.*','2:8']]", "pruner.pattern=1:4",
         "train.optimizer.lr=1", "datamodule.data_files=[a.txt,b.txt]", "~model.config.attn_pdrop"]
    )  # fmt: skip
    assert (cfg.trainer.max_steps, type(cfg.trainer.max_steps)) == (400_000, int)
    assert (cfg.name, cfg.pruner.lora_rank, cfg.pruner.pattern) == ("2024", 0.0156, "1:4")
    assert cfg.pruner.rules == [["*.mlp.*", "2:8"]]
    assert "attn_pdrop" not in cfg.model.config
    cfg = configs.compose(
        ['pruner.sparsity_increment="0,12,-1"', "pruner.dense_start=0.75", "pruner.lora_scale=2",
         "pruner.srste_decay=6e-6", "pruner.unstructured_mask_sparsity=12.5", "init_from=a/b.ckpt"]
    )  # fmt: skip
    assert (cfg.pruner.sparsity_increment, cfg.pruner.dense_start) == ("0,12,-1", 0.75)
    assert (cfg.pruner.lora_scale, cfg.pruner.srste_decay) == (2, 6e-6)
    assert (cfg.pruner.unstructured_mask_sparsity, cfg.init_from) == (12.5, "a/b.ckpt")
    cfg = configs.compose(["pruner.sparsity_increment=12", "pruner.dense_start=null"])
    assert (cfg.pruner.sparsity_increment, cfg.pruner.dense_start) == (12, None)
    assert configs.compose(["pruner.sparsity_increment=[0,12,-1]"]).pruner.sparsity_increment == [
        0, 12, -1
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pruner.lora_rnk=16", r"unknown key 'pruner.lora_rnk'; did you mean 'pruner.lora_rank'"),
        ("lora_rank=16", r"did you mean 'pruner.lora_rank'"),
        ("lr=1", r"did you mean 'train.optimizer.lr'.*\+lr=\.\.\."),
        ("datamodul=text", r"did you mean 'datamodule'"),
        ("trainer.gpus=8", r"unknown key 'trainer.gpus'"),
        ("experiment=owt/gpt2x", r"did you mean experiment=owt/gpt2\w+\? Choices: .*demo.*smoke"),
        ("experiment=gpt2s", r"did you mean experiment=owt/gpt2s\?"),
        ("optimizer=adam", r"no optimizer of that name; did you mean optimizer=adamw\?"),
        ("model=gpt2", r"did you mean model=gpt2/\w+\? Choices: bert/base"),
        ("trainer.max_steps=many", r"max_steps must be a whole number, for example .*=400000"),
        ("trainer.max_steps=1.5", r"max_steps must be a whole number"),
        ("trainer.max_steps=0", r"trainer.max_steps=0 must be a whole number of at least 1"),
        ("resume=1", r"resume must be True or False, for example resume=False"),
        ("seed=True", r"seed must be a whole number"),
        ("pruner.rules=dense", r"pruner.rules must be a list"),
        ("pruner.sparsity_increment=True", r"sparsity_increment must be a text or a whole number"),
        ("pruner.lora_lr=high", r"pruner.lora_lr must be a whole number or a number or null"),
        ("pruner.mvue=1", r"pruner.mvue must be True or False"),
        ("pruner=sr-st", r"no pruner of that name; did you mean pruner=sr-ste\?"),
        ("train.optimizer=adamw", r"is a section, not a value.*train.optimizer.lr"),
        ("train.optimizer.lr=0", r"train.optimizer.lr=0 must be a finite number above 0"),
        ("datamodule.batch_size=-1", r"datamodule.batch_size=-1 must be .* at least 1"),
        ("logger=tensorbord", r"logger='tensorbord' is unknown; choose one of csv, tensorboard"),
        ("name=../up", r"name='../up' cannot be a folder's name"),
        ("name=", r"name='' cannot be a folder's name"),
        ("resume", r"'resume' is not of the form key=value"),
        ("a==b", r"cannot be read; a value with special characters needs quotes"),
        ("pruner.sparsity_increment=0,12,-1", r"is a list of runs.*sparsity_increment=\"0,12,-1\""),
        ("datamodule=text", r"datamodule.data_files must be given; add datamodule.data_files=\.\."),
        ("paths.root=${nothing}", r"nothing"),
        ("+seed=3", r"seed"),
        ("pruner.foo=1", r"unknown key 'pruner.foo'\. "),
        ("pruner.seed=1", r"did you mean 'pruner.mask_seed'\?"),
        ("trainer.lr=1", r"did you mean 'train.optimizer.lr'\?"),
        ("pruner.sparsity_increment=null", r'for example pruner.sparsity_increment=""\.$'),
        ("~pruner", r"^'~pruner': only what is inside compare .*; type pruner=<one of .*, none, "),
        ("~train.optimizer", r"^'~train.optimizer': only .*; type train.optimizer=<a value>\.$"),
        ("~plot", r"since every run reads the rest; type plot=<a value>"),
    ],
)
def test_mistake_is_named(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configs.compose([override])


@pytest.mark.parametrize("name", ["1e5", "007", "1.50", "2024", "0x10", "1_000"])
def test_a_name_is_taken_as_it_was_typed(name: str) -> None:
    cfg = configs.compose([f"name={name}"])
    assert (cfg.name, cfg.paths.log_dir) == (name, f"./logs/{name}")
    assert configs.compose([f"init_from={name}"]).init_from == name


def test_settings_of_data_that_are_null_by_default_have_kinds_too() -> None:
    with pytest.raises(ValueError, match=r"max_documents=2.5 must be null or a whole number of at"):
        configs.compose(["experiment=smoke", "datamodule.max_documents=2.5"])
    cfg = configs.compose(["experiment=smoke", "datamodule.eos_token=0"])
    from slope.data import DataConfig

    assert DataConfig.from_config(cfg.datamodule).eos_token == "0"


def test_no_experiment_is_the_default() -> None:
    assert configs.compose(["experiment=null"]) == configs.compose([])


POLYNOMIAL = "scheduler=polynomial_warmup"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.gradient_clip_val=-1", r"null or a finite number above 0; .*null to clip not"),
        ("trainer.gradient_clip_val=0", r"must be null or a finite number above 0"),
        ("trainer.gradient_clip_val=nan", r"must be null or a finite number above 0"),
        ("trainer.gradient_clip_val=inf", r"must be null or a finite number above 0"),
        ("train.scheduler.min_lr_ratio=-0.1", r"must be a number from 0 to 1; type train.sched"),
        ("train.scheduler.min_lr_ratio=2", r"min_lr_ratio=2 must be a number from 0 to 1"),
        ("train.scheduler.warmup_ratio=-0.1", r"must be a number from 0 to 1"),
        ("train.scheduler.warmup_ratio=nan", r"warmup_ratio=nan must be a number from 0 to 1"),
        ("train.scheduler.warmup_steps=-1", r"null or a whole number of at least 0; .*=null for"),
        ("train.scheduler.degree=-1", r"degree=-1 must be a finite number of at least 0"),
        ("train.optimizer.weight_decay=-0.1", r"must be a finite number of at least 0"),
        ("train.optimizer.weight_decay=inf", r"weight_decay=inf must be a finite number"),
        ("train.optimizer.betas=[0.9]", r"\[0.9\] must be two numbers of at least 0 and below 1"),
        ("train.optimizer.betas=[0.9,1]", r"must be two numbers of at least 0 and below 1"),
        ("train.optimizer.betas=[-0.1,0.9]", r"type 'train.optimizer.betas=\[0.9,0.999\]'"),
        ("train.optimizer.betas=[a,0.9]", r"must be two numbers of at least 0 and below 1"),
        ("train.optimizer.eps=0", r"eps=0 must be a finite number above 0; type .*=1e-8"),
        ("train.optimizer.eps=nan", r"eps=nan must be a finite number above 0"),
        ("train.optimizer.lr=inf", r"lr=inf must be a finite number above 0"),
        ("callbacks.checkpoint.every_n_steps=-1", r"at least 0; .*=1000, or 0 for the last step"),
        ("callbacks.checkpoint.progress_every_n_steps=-1", r"at least 0; .*=10000, or 0 for none"),
        ("callbacks.checkpoint.save_top_k=-1", r"0 for none; .*progress_every_n_steps .* is all"),
        ("pruner.lora_rank=nan", r"pruner.lora_rank=nan must be a finite number; type .*=16"),
        ("pruner.lora_rank=inf", r"pruner.lora_rank=inf must be a finite number"),
        ("seed=-1", r"seed=-1 must be a whole number of at least 0 .*; type seed=1111"),
        (f"seed={10**20}", rf"seed={10**20} must be .* at most {2**63 - 1}"),
        (f"datamodule.val_split_seed={10**50}", rf"must be .* at most {2**63 - 1}; .*=2357"),
        (f"trainer.max_steps={10**21}", rf"must be .* at most {10**12}; type trainer.max_steps="),
        ("trainer.limit_val_batches=0", r"at least 1; .*=null for .*; trainer.val_check_interval="),
        ("trainer.limit_val_batches=-1", r"must be null or a whole number of at least 1"),
        ("generate.max_new_tokens=0", r"must be a whole number of at least 1; type generate.max_n"),
    ],
)
def test_a_number_outside_its_range_is_refused(override: str, message: str) -> None:
    key, _, value = override.partition("=")
    with pytest.raises(ValueError, match=rf"^{re.escape(key)}=.* must be .*; type ") as caught:
        configs.compose([POLYNOMIAL, override])
    assert re.search(message, str(caught.value))


def test_the_ends_of_the_ranges_are_allowed() -> None:
    cfg = configs.compose(
        [POLYNOMIAL, "trainer.gradient_clip_val=null", "train.scheduler.min_lr_ratio=1",
         "train.scheduler.warmup_ratio=0", "train.scheduler.warmup_steps=0",
         "train.scheduler.degree=0", "train.optimizer.weight_decay=0",
         "train.optimizer.betas=[0,0.5]", "callbacks.checkpoint.every_n_steps=0",
         "callbacks.checkpoint.save_top_k=0", "pruner.lora_rank=0", "seed=0",
         "trainer.max_steps=1", "trainer.limit_val_batches=1", "generate.max_new_tokens=1"]
    )  # fmt: skip
    assert cfg.trainer.gradient_clip_val is None
    assert configs.compose([f"seed={2**63 - 1}"]).seed == 2**63 - 1


def test_every_range_is_of_a_key_that_exists() -> None:
    cfg = configs.compose([POLYNOMIAL])
    absent = object()
    missing = [
        key for key in ranges._RANGES if OmegaConf.select(cfg, key, default=absent) is absent
    ]
    assert not missing


def test_every_group_is_listed() -> None:
    assert configs.groups() == [
        "callbacks", "datamodule", "experiment", "model", "optimizer", "pruner", "scheduler",
        "trainer",
    ]  # fmt: skip
    assert configs.choices("pruner") == [
        "extended-sr-ste", "fst", "none", "s-ste", "slope", "sr-ste"
    ]  # fmt: skip
    assert configs.choices("datamodule") == [
        "c4", "demo", "openwebtext", "text", "thepile", "wikipedia"
    ]  # fmt: skip


@pytest.mark.parametrize("dataset", ["c4", "demo", "openwebtext", "thepile", "wikipedia"])
def test_data_sets_have_the_same_keys(dataset: str) -> None:
    text = configs.compose(["datamodule=text", "datamodule.data_files=a.txt"])
    assert set(configs.compose([f"datamodule={dataset}"]).datamodule) == set(text.datamodule)
