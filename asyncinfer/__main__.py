"""`python -m asyncinfer`."""

import sys

from asyncinfer.cli import main

if __name__ == "__main__":
    sys.exit(main())
