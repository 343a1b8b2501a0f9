"""What a vendor of accelerators tells about its devices: the only folder that knows one by name."""
