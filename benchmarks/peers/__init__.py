"""Other programs that run GPT-2, measured beside model folders: `gpt2-edge bench --peers`.

`peer_process.py` and the `*_peer.py` files run inside a peer's own environment, in which gpt2-edge is not installed:
they import nothing of it. The other files are ordinary modules of gpt2-edge, which drive them.
"""
