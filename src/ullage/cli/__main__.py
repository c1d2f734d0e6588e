"""``python -m ullage.cli``."""

import sys

from ullage.cli import main

sys.exit(main())
