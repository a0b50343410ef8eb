"""Judge a model of digits: its drawings by a support vector machine, its captions by the held-out pictures' digits.

python studies/digits/score.py RUN     needs scikit-learn; see docs/applications.md
"""

import sys

import numpy as np
from make_data import NAMES, digits
from sklearn.svm import SVC

import gptjax
from gptjax.decoding.marks import picture_prompt
from gptjax.sampling import Sampling
from gptjax.tokenizers.marked import PICTURE

DRAWINGS = 30  # of each digit
TEMPERATURE = 0.8

if __name__ == "__main__":
    lm = gptjax.load(sys.argv[1])
    levels, targets, held_out = digits()
    svm = SVC(gamma=0.001 * (16 / 15) ** 2, C=10).fit(levels[~held_out].reshape(-1, 64), targets[~held_out])
    found = svm.predict(levels[held_out].reshape(-1, 64))
    print(f"SVM on {held_out.sum()} held-out digits: {(found == targets[held_out]).mean():.1%} right")

    asked = np.repeat(np.arange(10), DRAWINGS)
    prompts = [NAMES[digit] + PICTURE for digit in asked]
    drawn = lm.complete(prompts, 65, Sampling(TEMPERATURE), seed=0)
    pictures = [lm.tokenizer.pictures_in([*lm.prompt_ids(done.prompt), *done.tokens]) for done in drawn]
    whole = np.array([len(some) == 1 for some in pictures])
    blank = np.zeros((8, 8), int)
    seen = svm.predict(np.array([some[0] if some else blank for some in pictures]).reshape(-1, 64))
    right = whole & (seen == asked)
    print(f"{len(asked)} drawings: {whole.mean():.1%} whole, {right.mean():.1%} are what was asked for")

    prompts = [picture_prompt(lm.tokenizer, picture) for picture in levels[held_out]]
    captions = [done.text for done in lm.complete(prompts, 8, Sampling(0.0))]
    named = [caption == NAMES[digit] for caption, digit in zip(captions, targets[held_out], strict=True)]
    print(f"{len(named)} captions of held-out digits: {np.mean(named):.1%} right")
