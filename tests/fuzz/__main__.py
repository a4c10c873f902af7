"""``python -m tests.fuzz``: see `tests.fuzz.runner`, a module of its own because processes find nothing in a package's main."""

import sys

from tests.fuzz.runner import main

sys.exit(main())
