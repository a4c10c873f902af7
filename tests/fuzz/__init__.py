"""Random files, random models and kills, for as long as one likes: ``python -m tests.fuzz --seconds 600 --seed 1``."""
