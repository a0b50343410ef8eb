"""Generate text from a trained model:

python sample.py runs/quickstart --prompt "ROMEO:" [--temperature 0.8 ...]
"""

import sys

from gptjax.cli import sample

if __name__ == "__main__":
    sys.exit(sample(sys.argv[1:]))
