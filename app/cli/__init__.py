"""The commands of `entrypoint.py`: each reads its arguments and hands over."""
