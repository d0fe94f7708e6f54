"""Large models on many ranks, sized in one process."""
