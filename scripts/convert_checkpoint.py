"""``openllama convert`` under the name that the published model cards use."""

import sys

from openllama.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
