"""How fast private training is, against the same training without privacy and against other libraries."""
