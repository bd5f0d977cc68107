"""The progress bar: which case, how many are done, and how much of the time is used."""

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress


class Progress:
    """A bar on `console`; with None, nothing is shown."""

    def __init__(self, console: Console | None, budget_s: float | None = None) -> None:
        limit = f"of at most {budget_s / 60:.1f} min" if budget_s else ""
        self._bar = RichProgress(
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn(limit),
            TextColumn("{task.description}"),
            console=console,
            disable=console is None,
            transient=True,
        )
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def start(self, total: int) -> None:
        self._bar.reset(self._task, total=total)

    def show(self, what: str) -> None:
        self._bar.update(self._task, description=what)

    def advance(self) -> None:
        self._bar.advance(self._task)
