"""Faults of model folders."""

import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from faults.table import Fault
from safetensors.numpy import load_file, save_file
from small_policy import ALPHABET, small_policy
from transformers import LlamaConfig, LlamaForCausalLM

from moe_rl.policy.tokenizer import character_tokenizer

TRAIN = ("train", "--preset", "tiny", "--checkpoint", "model", "--out", "run")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@functools.cache
def saved() -> Path:
    """A whole model folder, made once."""
    folder = Path(tempfile.mkdtemp(prefix="moe-rl-model-"))
    policy = small_policy()
    policy.model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    return folder


def model(change: Callable[[Path], object], *, torch: bool = False) -> Fault:
    """Training from a copy of the whole model in which something was changed."""

    def given(folder: Path) -> None:
        shutil.copytree(saved(), folder / "model")
        change(folder / "model")

    return Fault(TRAIN, given, torch=torch)


def configured(**changes: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def in_shards(folder: Path) -> dict[str, str]:
    """The weights in two files with an index; returns its map."""
    weights = load_file(folder / WEIGHTS)
    names = sorted(weights)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    places = {}
    for number, half in enumerate(halves, start=1):
        shard = f"model-0000{number}-of-00002.safetensors"
        save_file({name: weights[name] for name in half}, folder / shard, {"format": "pt"})
        places |= dict.fromkeys(half, shard)
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return places


def without_a_shard(folder: Path) -> None:
    in_shards(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def with_a_wrong_shard(folder: Path) -> None:
    in_shards(folder)
    shutil.copy(
        folder / "model-00001-of-00002.safetensors", folder / "model-00002-of-00002.safetensors"
    )


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def cut_off(folder: Path) -> None:
    raw = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(raw[: len(raw) // 2])


def lacking(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    kept = {name: weight for name, weight in weights.items() if "layers.1.mlp" not in name}
    save_file(kept, folder / WEIGHTS, {"format": "pt"})


def without_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def tokenizer_of(alphabet: str) -> Callable[[Path], object]:
    return lambda folder: character_tokenizer(alphabet).save_pretrained(folder)


def without_experts(folder: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 13}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(folder)


MODELS = {
    "no model in the folder": Fault(TRAIN, lambda folder: (folder / "model").mkdir()),
    "a config that is not JSON": model(lambda x: (x / "config.json").write_text("{")),
    "a config that is no object": model(lambda x: (x / "config.json").write_text("[]")),
    "no weights": model(lambda x: (x / WEIGHTS).unlink()),
    "pickled weights": model(pickled),
    "weights cut off": model(cut_off),
    "a shard missing": model(without_a_shard),
    "a shard of other weights": model(with_a_wrong_shard),
    "an index of nothing": model(
        lambda x: (in_shards(x), (x / INDEX).write_text('{"weight_map": {}}'))
    ),
    "no tokenizer": model(without_tokenizer),
    "a tokenizer that is not JSON": model(lambda x: (x / "tokenizer.json").write_text("{")),
    "weights missing": model(lacking, torch=True),
    "weights of other shapes": model(configured(moe_intermediate_size=24), torch=True),
    "a config of wrong types": model(configured(num_hidden_layers="two"), torch=True),
    "a family that transformers does not know": model(configured(model_type="evil"), torch=True),
    "a family of code in the folder": model(
        configured(model_type="evil", auto_map={"AutoConfig": "evil.Config"}), torch=True
    ),
    "a model without experts": model(without_experts, torch=True),
    "a tokenizer of more words": model(tokenizer_of(ALPHABET + "+-*"), torch=True),
    "a tokenizer of other characters": model(tokenizer_of("abcdefghijk"), torch=True),
    "a tokenizer that is no tokenizer": model(
        lambda x: (x / "tokenizer.json").write_text('{"model": {"type": "evil"}}'), torch=True
    ),
    "a context that is too short": model(configured(max_position_embeddings=5), torch=True),
}
