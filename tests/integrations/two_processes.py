"""What each of two processes runs: it trains, and writes what it logged and saw."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from tiny_trl import Spy, build, logged, own_engine


def follows(seen: dict[str, Any]) -> bool:
    """Did the forward in the loss go where the record says? -1 says nothing."""
    record = seen["inputs"]["routed_experts"]
    return torch.equal(seen["used"][record >= 0], record[record >= 0])


def main(folder: Path, mode: str) -> None:
    torch.set_num_threads(1)
    options: dict[str, Any] = {"rollout_func": own_engine} if mode == "R3" else {}
    settings = {"max_steps": 2, "per_device_train_batch_size": 4}
    options |= {"routing_replay": mode, "attribution_every": 1}
    trainer = build(folder, kind=Spy, args=settings, **options)
    trainer.train()
    columns = ("old_per_token_logps", "completion_mask", "advantages")
    record = {
        "processes": trainer.accelerator.num_processes,
        "lines": logged(trainer),
        "weights": sum(p.double().abs().sum().item() for p in trainer.model.parameters()),
        "tokens": trainer.seen[0]["inputs"]["completion_ids"].tolist(),
        "followed": all(follows(seen) for seen in trainer.seen),
        "seen": [
            {"logprobs": s["logprobs"].tolist(), **{n: s["inputs"][n].tolist() for n in columns}}
            for s in trainer.seen
        ],
    }
    rank = trainer.accelerator.process_index
    (folder / f"rank{rank}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
