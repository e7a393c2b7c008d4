"""The Mixture-of-Experts layer: router, capacity rule, dispatcher and experts, each swappable without the others."""
