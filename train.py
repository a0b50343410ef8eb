"""Train a GPT, or resume the run that its directory holds:

python train.py configs/quickstart.yaml [--model.n_layers 8 ...]
"""

import sys

from gptjax.cli import train

if __name__ == "__main__":
    sys.exit(train(sys.argv[1:]))
