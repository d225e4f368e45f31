"""A small GPT on the standard library's sources, on a Ray cluster: `python train.py`, or through `ray job submit`."""

import ray_dr
from ray_dr.train.gpt import train

if __name__ == "__main__":
    ray_dr.run(train, "job.yaml")
