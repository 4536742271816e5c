"""Rules: what emits the engine's steps for one node of the graph, by kind of node."""
