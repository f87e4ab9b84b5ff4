"""Runs the verifier as `python -m drydock.verify`."""

import gc
import sys

from drydock.verify import main

# Nothing is thrown away before the end, and 100,000 rows that are kept would be gone through again and again.
gc.disable()
sys.exit(main())
