"""Runs the verifier as `python -m drydock.verify`."""

import sys

from drydock.verify import main

sys.exit(main())
