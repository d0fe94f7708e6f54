"""A page for the person who must sign: what was trained, how, and what it cost."""
