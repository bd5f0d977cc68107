"""What was chosen for each kind of call, and for how long it holds."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

from torch import Tensor

Answer = TypeVar("Answer")


class Choices(Generic[Answer]):
    """Answers by key, `most` at a time.

    One that is not final was made where a GPU may not be measured (another stream than the default
    one, under capture). It holds there, call after call, until a kernel is checked or timed
    elsewhere in this process; where measuring is allowed it does not hold at all.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._final: dict[Any, Answer] = {}
        self._for_now: dict[Any, tuple[Answer, int]] = {}

    def get(self, key: Any, x: Tensor) -> Answer | None:
        """The answer that holds for a call on the device of x now."""
        answer = self._final.get(key)
        if answer is not None or not self._for_now:
            return answer
        found = self._for_now.get(key)
        if found is None:
            return None
        from lora_fused import gpu_store, gpu_tuning

        answer, lessons = found
        holds = lessons == gpu_store.lessons() and not gpu_tuning.may_measure(x.device)
        return answer if holds else None

    def keep(self, key: Any, answer: Answer, final: bool = True) -> None:
        """Remember an answer; all others are dropped first where there are too many."""
        if len(self) >= self.most:
            self.clear()
        self._for_now.pop(key, None)
        if final:
            self._final[key] = answer
        else:
            from lora_fused import gpu_store

            self._for_now[key] = answer, gpu_store.lessons()

    def __len__(self) -> int:
        return len(self._final) + len(self._for_now)

    def clear(self) -> None:
        """Forget everything."""
        self._final.clear()
        self._for_now.clear()
