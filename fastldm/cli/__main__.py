"""``python -m fastldm.cli``."""

import sys

from fastldm.cli import main

sys.exit(main())
