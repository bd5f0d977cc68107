"""The suites other than `layer` and `claims`: what each measures is in the file of its name."""

from benchmarks.suites import block, compile, decode, group, kernel, memory, model, overhead
from benchmarks.suites.item import Suite

SUITES: dict[str, Suite] = {
    module.SUITE.name: module.SUITE
    for module in (kernel, group, block, model, decode, memory, compile, overhead)
}
