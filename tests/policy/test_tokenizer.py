"""A checkpoint's tokenizer as it is meant: special tokens, chat template, ends, spelling."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_policy import ALPHABET, small_policy
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import GenerationConfig, PreTrainedTokenizerFast

from moe_rl.config import ConfigError, ModelConfig
from moe_rl.policy.build import build_policy
from moe_rl.policy.fit import check_fit
from moe_rl.policy.folder import find_model
from moe_rl.policy.policy import Policy
from moe_rl.policy.tokenizer import encode_prompt, end_ids, tokenizer_of
from moe_rl.rollout.cached import generate
from moe_rl.tasks import Dataset, make_task
from moe_rl.training.cold_start import _supervised_batch

TEXTS = ["capital of France? ", "Paris", " two\nlines", "four, I think .", "cafe\u0301", "1+1="]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def trained(pre: Any, decoder: Any, normalizer: Any = None) -> Tokenizer:
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre, decoder
    if normalizer is not None:
        made.normalizer = normalizer
    special = ["<unk>", "<s>", "</s>"]
    letters = pre_tokenizers.ByteLevel.alphabet() if "Byte" in repr(pre) else []
    made.train_from_iterator(
        [*TEXTS, "[user]assistant", "\u00e9"],
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=special, initial_alphabet=letters, show_progress=False
        ),
    )
    return made


def metaspace(scheme: str) -> Tokenizer:
    """As Llama's and Mixtral's: a space in front, which decoding takes away again."""
    strip = [decoders.Strip(" ", 1, 0)] if scheme != "never" else []
    decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), *strip])
    return trained(pre_tokenizers.Metaspace(prepend_scheme=scheme), decoder)


def byte_level() -> Tokenizer:
    """As Qwen's: bytes, behind Unicode's composed form."""
    return trained(
        pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel(), normalizers.NFC()
    )


KINDS = {
    "metaspace": lambda: metaspace("first"),
    "metaspace, every word": lambda: metaspace("always"),
    "metaspace, no prefix": lambda: metaspace("never"),
    "bytes, NFC": byte_level,
}


def finished(made: Tokenizer, added: str) -> PreTrainedTokenizerFast:
    """In transformers' form; `added` is what the tokenizer puts around a text, $A."""
    ids = [(name, made.token_to_id(name)) for name in ("<s>", "</s>")]
    made.post_processor = processors.TemplateProcessing(single=added, special_tokens=ids)
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **names, pad_token="</s>")


def policy_with(tokenizer: PreTrainedTokenizerFast, folder: Path) -> Policy:
    """Read back from a folder, as a checkpoint is."""
    model = build_policy(ModelConfig(hidden_size=24), [chr(i) for i in range(300, 700)]).model
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return build_policy(ModelConfig(checkpoint=str(folder)), "")


@pytest.mark.parametrize("kind", KINDS)
def test_every_text_that_a_tokenizer_reads_back_is_taken(kind: str, tmp_path: Path) -> None:
    policy = policy_with(finished(KINDS[kind](), "<s> $A"), tmp_path)
    rows = [{"prompt": text, "answer": answer} for text in TEXTS for answer in TEXTS]
    check_fit(policy, rows_task(rows, tmp_path, response_tokens=40))
    check_fit(policy, make_task("dataset", dataset=str(tmp_path / "rows.jsonl"), chat=False))


def rows_task(rows: list[dict[str, Any]], folder: Path, **options: Any) -> Dataset:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Dataset(dataset=str(folder / "rows.jsonl"), **options)


@pytest.mark.parametrize("kind", ["metaspace", "metaspace, no prefix"])
def test_a_text_that_a_tokenizer_loses_is_refused_with_its_row(kind: str, tmp_path: Path) -> None:
    policy = policy_with(finished(KINDS[kind](), "<s> $A"), tmp_path)
    good = {"prompt": "Paris", "answer": "Paris"}
    for bad, words in (
        ({"prompt": "Paris %", "answer": "Paris"}, "line 2: .* reads the prompt 'Paris %' back"),
        ({"prompt": "Paris", "answer": "%"}, "line 2: .* reads the answer '%' back as ''"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_fit(policy, rows_task([good, bad], tmp_path, response_tokens=40))
    with pytest.raises(ConfigError, match=r"task running_sum: .* reads the prompt"):
        check_fit(policy, make_task("running_sum", digits=9))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("added", ["<s> $A", "$A", "<s> $A </s>", "$A </s>", "<s> <s> $A"])
def test_a_prompt_has_what_the_tokenizer_puts_in_front_and_nothing_behind(
    kind: str, added: str
) -> None:
    tokenizer = finished(KINDS[kind](), added)
    front = [tokenizer.bos_token_id] * added.count("<s>")
    for text in TEXTS:
        ids = encode_prompt(tokenizer, text)
        assert ids == front + tokenizer.encode(text, add_special_tokens=False)
        whole = tokenizer(text)["input_ids"]
        assert ids == whole[: len(whole) - added.count("</s>")]
    assert encode_prompt(tokenizer, "<s>Paris").count(tokenizer.bos_token_id) == 1


def test_prompts_of_a_rollout_and_of_a_cold_start_are_the_same(tmp_path: Path) -> None:
    policy = policy_with(finished(byte_level(), "<s> $A"), tmp_path)
    ids, mask = policy.encode_prompts(TEXTS)
    supervised, _, labels = _supervised_batch(policy, [(text, "Paris") for text in TEXTS])
    for row, kept, read, wanted in zip(ids, mask, supervised, labels, strict=True):
        prompt = row[kept]
        assert prompt[0] == policy.tokenizer.bos_token_id and not kept[: -len(prompt)].any()
        assert torch.equal(read[: len(prompt)], prompt)
        assert (wanted[: len(prompt)] == -100).all() and wanted[len(prompt)] != -100
        assert wanted[wanted != -100][-1] == policy.eos_id


def test_messages_go_through_the_chat_template() -> None:
    tokenizer = finished(byte_level(), "<s> $A")
    asked = [{"role": "user", "content": "Paris"}]
    with pytest.raises(ConfigError, match="tokenizer has no chat template"):
        encode_prompt(tokenizer, asked)
    tokenizer.chat_template = TEMPLATE
    ids = encode_prompt(tokenizer, asked)
    assert tokenizer.decode(ids) == "<s>[user]Paris[assistant]"
    assert ids == encode_prompt(tokenizer, "<s>[user]Paris[assistant]")
    with pytest.raises(ConfigError, match=r"refuses these messages .no tools"):
        encode_prompt(tokenizer, [{"role": "tool", "content": "x"}])


@pytest.mark.parametrize(
    ("configured", "expected"), [(None, (1,)), (1, (1,)), (7, (1, 7)), ([7, 1, 5], (1, 7, 5))]
)
def test_all_ends_of_the_generation_config_end_a_response(configured: Any, expected: Any) -> None:
    config = GenerationConfig(eos_token_id=configured)
    assert end_ids(tokenizer_of(ALPHABET), config) == expected


def test_more_ends_only_cut_responses_short() -> None:
    """A draw decides a position, so that a response with a second end is the beginning of one."""
    policy, rng = small_policy(), torch.Generator().manual_seed(0)
    draws = torch.rand(64, 12, dtype=torch.float64, generator=rng)
    whole = generate(policy, ["1234="] * 8, draws)
    uncut = policy.until_end(whole.response_ids)
    second = 5
    policy = small_policy()
    policy.model.generation_config.eos_token_id = [second, 1]
    cut = generate(policy, ["1234="] * 8, draws)
    assert (whole.response_ids == second).any()
    for i, (short, long) in enumerate(zip(policy.until_end(cut.response_ids), uncut, strict=True)):
        expected = long[: long.index(second) + 1] if second in long else long
        assert short == expected == cut.response_ids[i][cut.response_mask[i]].tolist()
        assert bool(cut.truncated[i]) == (not {second, 1} & {*short})
    spoken = policy.decode(cut.response_ids)
    assert not any(policy.tokenizer.decode([second]) in text for text in spoken)


def test_a_hub_id_is_read_from_the_local_cache_and_named_where_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    home, commit = tmp_path / "models--acme--tiny-moe", "0123456789abcdef0123456789abcdef01234567"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    policy = small_policy()
    policy.model.save_pretrained(home / "snapshots" / commit)
    policy.tokenizer.save_pretrained(home / "snapshots" / commit)
    for name in ("acme/tiny-moe", "acme/tiny-moe@main", f"acme/tiny-moe@{commit}"):
        assert find_model(name) == home / "snapshots" / commit
        loaded = build_policy(ModelConfig(checkpoint=name), "")
        ids = torch.tensor([[2, 3, 4]])
        assert torch.equal(loaded.model(ids).logits, policy.model(ids).logits)
    with pytest.raises(ConfigError, match=r"checkpoint='acme/other': no such folder here"):
        find_model("acme/other")
    assert find_model("acme/t.npy") == Path("acme/t.npy") and find_model("model") == Path("model")
