"""The desk: all nodes from one terminal. It knows them by ssh and Docker only, and nothing of the launcher."""
