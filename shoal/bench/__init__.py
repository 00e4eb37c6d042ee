"""How fast the engine is, against the machine's own limits and against other engines. Nothing else may import it."""
