"""`python -m lloki_atlas.cli`: the command line without its script."""

from lloki_atlas.cli.main import main

if __name__ == "__main__":  # worker processes import this module too
    main()
