"""The intermediate representation: sizes, labels, the joint graph, and what is done to any graph."""
