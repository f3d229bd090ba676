"""What tests run in several processes, which import this module: torch comes late."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from unike.system import launching, processes
from unike.types import UserError


def talk(argv: list[str]) -> int:
    """What two processes tell each other, as JSON."""

    def body() -> int:
        processes.join("cpu")
        rank = processes.get_rank()

        def fails_there(n: int) -> int:
            if n == 3:
                raise UserError(f"{n}: is bad")
            return n

        heard: list[int] = []
        found: dict[str, Any] = {
            "gathered": processes.gather(rank + 10),
            "first": processes.run_once(lambda: f"from {rank}"),
            "in turn": processes.run_in_turn(lambda: rank),
            "spread": processes.spread(list(range(5)), lambda n: (n, rank), heard.append),
            "heard": sorted(heard),
            "share": list(processes.share(range(5))),
        }
        for name, work in (
            ("spread fails", lambda: processes.spread([1, 2, 3, 3], fails_there)),
            ("each fails", lambda: processes.run_everywhere(lambda: fails_there(2 + rank))),
            ("first fails", lambda: processes.run_once(lambda: fails_there(3))),
            ("in turn fails", lambda: processes.run_in_turn(lambda: fails_there(2 + rank))),
        ):
            try:
                work()
            except processes.SharedError as error:
                found[name] = error.problems
        import torch

        weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
        weights[0].grad = torch.tensor([1.0, rank])
        if rank == 1:
            weights[1].grad = torch.ones(2)
        processes.add_gradients(weights)
        found["gradients"] = [None if w.grad is None else w.grad.tolist() for w in weights]
        Path(argv[0], f"{rank}.json").write_text(json.dumps(found))
        return 0

    return launching.run_guarded(body)


def die(argv: list[str]) -> int:
    """Ends as told, by rank."""
    how = argv[processes.get_rank()]
    if how == "wait":
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            return 130
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    return int(how)
