"""Whether a policy can hold what a task asks of it: its context, and what its tokenizer can spell.

Checked before a cold start or a rollout: beyond its context a model still answers, but with noise.
"""

from moe_rl.config import ConfigError
from moe_rl.policy.policy import Policy
from moe_rl.tasks import Task


def check_fit(policy: Policy, task: Task) -> None:
    """Refuse a task whose prompts and responses the policy cannot hold.

    Raises:
        ConfigError: a prompt with the longest response exceeds the context; an answer in a dataset
            is longer than responses may be, or the tokenizer reads it back as something else.
    """
    rows, limit = task.listed(), task.max_response_tokens
    prompts = _encode(policy, [row.prompt for row in rows])
    lengths = [(row.where, len(prompt)) for row, prompt in zip(rows, prompts, strict=True)]
    context = getattr(policy.model.config.get_text_config(), "max_position_embeddings", None)
    for where, length in lengths or [(f"task {task.name}", task.max_prompt_tokens)]:
        if context is not None and length + limit > context:
            raise ConfigError(
                f"{where}: a prompt of {length} tokens and a response of {limit} exceed the "
                f"model's context of {context} (max_position_embeddings); shorten the prompt, "
                "lower response_tokens, or take a model of a longer context"
            )
    answers = _encode(policy, [row.answer for row in rows])
    for row, answer in zip(rows, answers, strict=True):
        if len(answer) + 1 > limit:
            raise ConfigError(
                f"{row.where}: the answer takes {len(answer) + 1} tokens with the end of sequence, "
                f"a response has at most {limit}; raise response_tokens"
            )
        text = policy.tokenizer.decode(answer, skip_special_tokens=True)
        if text.strip() != row.answer.strip():
            raise ConfigError(
                f"{row.where}: the model's tokenizer reads the answer {row.answer!r:.60} back as "
                f"{text!r:.60}, so that no response can be right; take another tokenizer"
            )


def _encode(policy: Policy, texts: list[str]) -> list[list[int]]:
    return policy.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
