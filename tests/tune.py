"""torchtune for the tests: the real one where it is installed, else tests/standin/torchtune."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

REAL = importlib.util.find_spec("torchtune") is not None
if not REAL:
    sys.path.append(str(Path(__file__).parent / "standin"))

_peft: Any = importlib.import_module("torchtune.modules.peft")
LoRALinear, DoRALinear = _peft.LoRALinear, _peft.DoRALinear
