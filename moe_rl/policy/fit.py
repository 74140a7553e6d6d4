"""Whether a policy can hold what a task asks of it: its context, and what its tokenizer can spell.

Found before a cold start or a rollout: behind its context a model says something, but nothing that
it was made for.
"""

from collections.abc import Sequence

from moe_rl.config import ConfigError
from moe_rl.policy.policy import Policy
from moe_rl.tasks import Listed, Task

_HOW = "shorten it, lower the length of responses, or take a model of a longer context"


def check_fit(policy: Policy, task: Task) -> None:
    """Refuse a task whose prompts and responses the policy cannot hold.

    Raises:
        ConfigError: a prompt with the longest response exceeds the context; or, of a task that
            reads a file, an answer is longer than responses may be, or is not what the tokenizer
            reads back. Names the line of the file.
    """
    context = getattr(policy.model.config.get_text_config(), "max_position_embeddings", None)
    rows = task.listed()
    if rows:
        _check_rows(policy, rows, task.max_response_tokens, context)
        return
    prompt, response = task.max_prompt_tokens, task.max_response_tokens
    if context is not None and prompt + response > context:
        raise ConfigError(
            f"task {task.name}: a prompt of {prompt} tokens and a response of {response} exceed "
            f"the model's context of {context} (max_position_embeddings); {_HOW}"
        )


def _check_rows(policy: Policy, rows: Sequence[Listed], response: int, context: int | None) -> None:
    prompts = _encode(policy, [row.prompt for row in rows])
    answers = _encode(policy, [row.answer for row in rows])
    spelled = policy.tokenizer.batch_decode(answers, skip_special_tokens=True)
    for row, prompt, answer, text in zip(rows, prompts, answers, spelled, strict=True):
        if not prompt:
            raise ConfigError(f"{row.where}: the model's tokenizer reads nothing in the prompt")
        if context is not None and len(prompt) + response > context:
            raise ConfigError(
                f"{row.where}: a prompt of {len(prompt)} tokens and a response of {response} "
                f"exceed the model's context of {context} (max_position_embeddings); {_HOW}"
            )
        if len(answer) + 1 > response:
            raise ConfigError(
                f"{row.where}: the answer takes {len(answer) + 1} tokens with the end of sequence, "
                f"a response has at most {response}; raise response_tokens"
            )
        if text.strip() != row.answer.strip():
            raise ConfigError(
                f"{row.where}: the model's tokenizer reads the answer {row.answer!r:.60} back as "
                f"{text!r:.60}, so no response can be right"
            )


def _encode(policy: Policy, texts: list[str]) -> list[list[int]]:
    ids: list[list[int]] = policy.tokenizer(texts, add_special_tokens=False)["input_ids"]
    return ids
