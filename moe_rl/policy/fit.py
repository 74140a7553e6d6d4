"""Whether a policy can hold what a task asks of it: its context, and what its tokenizer can spell.

Checked on each prompt and answer before a cold start or a rollout: beyond its context a model still
answers, but with noise, and what a tokenizer cannot read or write nobody sees in a log.
"""

import unicodedata

from moe_rl.config import ConfigError
from moe_rl.policy.policy import Policy
from moe_rl.policy.tokenizer import chat_text, encode_prompt, read_tokens
from moe_rl.tasks import Task
from moe_rl.tasks.base import Listed, Prompt


def check_fit(policy: Policy, task: Task) -> None:
    """Refuse a task whose prompts and responses the policy cannot hold.

    Raises:
        ConfigError: a prompt with the longest response exceeds the context, or the tokenizer loses
            characters of it; an answer is longer than responses may be, or the tokenizer reads it
            back as something that is not right.
    """
    for row in task.listed():
        check_prompt(policy, row.problem.prompt, task.max_response_tokens, row.where)
        if row.answer is not None:
            _check_answer(policy, task, row, row.answer)


def check_prompt(policy: Policy, prompt: Prompt, limit: int, where: str) -> None:
    """Refuse a prompt that the policy cannot hold with `limit` tokens of response.

    Raises:
        ConfigError: as of `check_fit`; begins with `where`.
    """
    try:
        ids = encode_prompt(policy.tokenizer, prompt)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    context = policy.context
    if context is not None and len(ids) + limit > context:
        raise ConfigError(
            f"{where}: a prompt of {len(ids)} tokens and a response of {limit} exceed the "
            f"model's context of {context} (max_position_embeddings); shorten the prompt, "
            "allow fewer response tokens (response_tokens), or take a model of a longer context"
        )
    text = prompt if isinstance(prompt, str) else chat_text(policy.tokenizer, prompt)
    read = policy.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    if not _bare(read).endswith(_bare(text)):  # in front of it stands what the tokenizer adds
        raise ConfigError(
            f"{where}: the model's tokenizer reads the prompt {text!r:.60} back as "
            f"{read!r:.60}, so that the model does not see it; take another tokenizer"
        )


def _check_answer(policy: Policy, task: Task, row: Listed, answer: str) -> None:
    limit = task.max_response_tokens
    ids = policy.tokenizer.encode(answer, add_special_tokens=False)
    if len(ids) + 1 > limit:
        raise ConfigError(
            f"{row.where}: the answer takes {len(ids) + 1} tokens with the end of sequence, "
            f"a response has at most {limit}; raise response_tokens"
        )
    text = read_tokens(policy.tokenizer, ids)
    columns = {name: [value] for name, value in row.problem.columns.items()}
    if text != answer and task.reward([row.problem.prompt], [text], **columns)[0] < 1:
        raise ConfigError(
            f"{row.where}: the model's tokenizer reads the answer {answer!r:.60} back as "
            f"{text!r:.60}, so that no response can be right; take another tokenizer"
        )


def _bare(text: str) -> str:
    """A text without what tokenizers normalise: white space, and forms of one character."""
    return "".join(unicodedata.normalize("NFKC", text).split())
