"""The folder that `transformers-quip run` puts on PYTHONPATH: its sitecustomize.py loads this package into any program."""
