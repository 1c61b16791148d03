"""What a trained model is worth: loss and perplexity, a bigram to compare with, generated text.

Importing the package does not import torch, so that ``slope eval`` can check what it was given
first.
"""

from slope.evaluation.bigram import bigram_loss
from slope.evaluation.perplexity import mean_loss, perplexity
from slope.evaluation.sampling import sample
from slope.evaluation.unigram import unigram_loss

__all__ = ["bigram_loss", "mean_loss", "perplexity", "sample", "unigram_loss"]
