"""`python -m gpt2_edge` is `gpt2-edge`."""

import sys

from gpt2_edge.cli import main

sys.exit(main())
