"""Analysis of a model's routes: their use, their behaviour under attack, and proofs about them."""
