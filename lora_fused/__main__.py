"""`python -m lora_fused doctor [--quick]`."""

import sys

from lora_fused import doctor


def main() -> int:
    """Run the command that was asked for."""
    if sys.argv[1:2] != ["doctor"]:
        print(f"{__doc__.strip().strip('`.')}: checks every kernel of this machine against torch")
        return 0 if sys.argv[1:] in ([], ["--help"], ["-h"]) else 2
    return doctor.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
