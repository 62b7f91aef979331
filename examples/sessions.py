"""Write a text in turns: append, generate, try two ways on, go back, save, and go on later.

Run: python examples/sessions.py [FOLDER]
"""

import sys
import tempfile
from pathlib import Path

import gpt2_edge

folder = sys.argv[1] if len(sys.argv) > 1 else "storyteller"
options = {"max_new_tokens": 30, "temperature": 0.8, "top_k": 40}

with gpt2_edge.load(folder) as model:
    session = model.session()
    session.append("The fisherman went to the sea, and")
    session.generate(seed=7, **options)
    print("the beginning:", session.text)

    # A fork shares what was computed so far, and then each goes its own way.
    other = session.fork()
    session.append(" But the fish")
    other.append(" Then the witch")
    print("one way:", session.generate(**options).text)
    print("the other:", other.generate(**options).text)

    # Back by so many tokens; only what is new is computed.
    length = len(session.tokens)
    undone = session.generate(**options)
    session.rewind(len(undone.tokens))
    print("back where it was:", len(session.tokens) == length)

    # A saved session goes on exactly where it was, also in another process.
    with tempfile.TemporaryDirectory() as scratch:
        session.save(Path(scratch) / "story.session")
        loaded = model.load_session(Path(scratch) / "story.session")
    print("the loaded one goes on alike:", loaded.generate(**options).tokens == session.generate(**options).tokens)
