"""Every tolerance that tests use, each with its derivation.

``u = eps / 2`` is the largest relative error of one rounded operation. A sum of n products is off by at most
``n·u`` and typically by ``√n·u``, in units of the product of the two vectors' norms. Unless a comment says
otherwise a tolerance serves as both ``rtol`` and ``atol``, for values of order 1.
"""

import math

import torch

from hyperadapt.normalization.formulas import ROUNDING

EPS_FLOAT64 = torch.finfo(torch.float64).eps  # 2.2e-16
EPS_FLOAT32 = torch.finfo(torch.float32).eps  # 1.2e-7
EPS_BFLOAT16 = torch.finfo(torch.bfloat16).eps  # 7.8e-3
EPS_FLOAT16 = torch.finfo(torch.float16).eps  # 9.8e-4

# A closed formula in float64 against the same formula in other steps. Sums have at most 1,000 terms:
# 1,000 · 2.2e-16 = 2.2e-13, times 4 for the few sums in a row.
FLOAT64_EXACT = 1e-12

# gradcheck takes central differences of step h = 1e-6: rounding contributes eps·|f|/h = 2e-10·|f|, truncation
# h²·|f'''|/6 = 2e-13·|f'''|. Test functions and their third derivatives stay below 100.
FLOAT64_GRADCHECK = 1e-7

# A short chain of float32 formulas (up to five sums of at most 64 terms) against the same in other order or
# against float64: √(5·64)·1.2e-7 = 2e-6 typically; times 5 for the largest of some thousand entries.
FLOAT32_FORMULA = 1e-5

# Two float32 evaluations of a small model (two layers, about 20 matrix products with sums of at most 128
# terms) that sum in different order: √(20·128)·1.2e-7 = 6e-6 typically; times 3 for the largest entry.
FLOAT32_FORWARD = 2e-5

# Difference of two float32 values of order 1, each off by a few roundings.
FLOAT32_DIFFERENCE = 8 * EPS_FLOAT32

# Adam's first step is lr·|g|/(|g| + 1e-8): shorter by 1e-8/|g|, with mean gradients above 1e-3 in the tests.
ADAM_FIRST_STEP = 1e-5

# Two float64 evaluations of a small model, gradients included, that sum in different order. The largest error
# over two layers' forward and backward, about 60 products in a row with sums of at most 128 terms:
# √(60·128)·2.2e-16 = 2e-14 in units of the terms. Gradients of the summed loss reach 100 and cancel to 1 in
# places, so times 100, and times 5 for the largest of some thousand entries.
FLOAT64_MODEL = 1e-11

# Stated requirement: an exported LoRA reproduces the live adapter's float32 outputs to this.
EXPORT_FLOAT32 = 1e-5

# Stated requirement: steps of training on one task, and on mixed batches, equal those of pinned tasks to this.
FLOAT32_TRAINED = 1e-5

# Random quantities may deviate by this many standard deviations: a chance of 6e-7 for a Gaussian one.
STANDARD_DEVIATIONS = 5

# Sum of the norms of the updates that a small bfloat16 network generates: about 20 roundings of u = 4e-3 in a
# row, 0.08 if all had the same sign.
BFLOAT16_NETWORK = 0.1

# Three bfloat16 tensors (A, B, core) that were each rounded once, 3·u, and a bound that was rounded twice,
# 2·u.
BFLOAT16_PRODUCT = 2.5 * EPS_BFLOAT16

# Cosines of a mean over tokens from two bfloat16 layers, where batches that are padded differently round some
# entries otherwise: a few roundings of u = 4e-3 in each entry, independent of each other, so that the vector turns
# by that angle; times √(2·12 products).
COSINE_BFLOAT16 = 2.5 * EPS_BFLOAT16


def norm_error(length: int, eps: float) -> float:
    """Relative error of a norm, or of a bound on it, that was computed from sums of `length` products.

    The squared norm's error is at most ``2·length·u``: one such sum in the Gram matrices and one over them.
    The square root halves that; the scale and its product with the update round a few times more.
    """
    return (length / 2 + 4) * eps


def lost_rank_error(r: int, dtype: torch.dtype) -> float:
    """Relative error of the largest singular value that `soft_polar` leaves of a huge update that has lost rank.

    Entries of the core that belong to lost directions are larger than others by up to 1/√share, with the share of
    ``formulas.ROUNDING``; what rounding leaves of sums of r of them counts beside the others.
    """
    return r * torch.finfo(dtype).eps / math.sqrt(ROUNDING[dtype])


def sample_variance_error(samples: int) -> float:
    """Relative deviation of a Gaussian sample's variance from the true one: its standard deviation is √(2/n).

    The samples must be independent; averaging further dependent ones can only shrink the deviation.
    """
    return STANDARD_DEVIATIONS * math.sqrt(2 / samples)


# Inverse square roots of float64 Gram matrices: their condition number, at most 1e4 in these tests, multiplies the
# rounding and a ridge of 1e-13.
FLOAT64_CONDITIONED = 1e4 * FLOAT64_EXACT

# What 20 iterations are asked to reach on logits of size 1; the last pass normalises rows, so columns are the rest.
SINKHORN_SUM = 1e-4


def gram_error(width: int) -> float:
    """Error of a float32 sum of `width` products of standard normals against the exact one.

    Rounding each of `width` additions of a sum of size at most 2 · width is off by half of EPS_FLOAT32 · 2 · width at
    the end of a random walk of that many steps: EPS_FLOAT32 · width · √width, which pairwise sums stay far below; a
    product in three passes of TF32 drops the product of two rests, 2⁻²² of it, over at most 2 · width. The 1e-6 is for
    the sums of a few terms.
    """
    return EPS_FLOAT32 * width * math.sqrt(width) + 2.0**-21 * width + 1e-6


def tensor_core_gram_error(width: int, dtype: torch.dtype) -> float:
    """Error of such a sum where tensor cores may form it, which add 16 products of 16-bit inputs at a time.

    They cut off what the sum has no place for, always towards zero: width / 16 times less than the last place of a sum
    that grows to width, EPS_FLOAT32 · width.
    """
    cut = 0.0 if dtype == torch.float32 else EPS_FLOAT32 * width * width / 16
    return gram_error(width) + cut


# Float32 inverse square roots of Gram matrices, whose condition number, at most 100 in these tests, multiplies the
# rounding.
FLOAT32_CONDITIONED = 1e2 * FLOAT32_FORMULA

# Stated requirement: the spectral norm from float32 Gram matrices, relative to a float64 SVD, at any condition.
SPECTRAL_NORM_FLOAT32 = 1e-5

# A ridge ε, relative to the mean eigenvalue of the Gram matrices, changes a square root of a singular one by √ε and so
# the update's singular vectors, times the condition of what is left, 10 in these tests.
RIDGE = 1e-13
RIDGED_RANK_DEFICIENT = 10 * math.sqrt(RIDGE)


def sinkhorn_permutation_error(iterations: int) -> float:
    """How far Sinkhorn's mixing may be from its limit, a permutation, in any entry.

    Towards a permutation the convergence is harmonic instead of geometric: for the matrix ``[[1, 1], [0, 1]]``, whose
    limit is the identity, the upper right entry is 1/(2n + 1) after n passes over columns and rows. Matrices of more
    rows are of the same order; times 4.
    """
    return 2 / iterations


# Widest gap between neighbouring levels of NF4, whose levels are quantiles of a Gaussian in [-1, 1]: from -1 to -0.696.
NF4_GAP = 0.304

# Gap between neighbouring levels of int8 weights, in units of the largest weight of a row.
INT8_GAP = 1 / 127

# Logits where activations are rounded to int8, in units of the largest. The float32 roundings that two evaluations
# differ by, 1e-6, carry one in 10,000 activations over the border between two levels, so a few in a row of some 2,000.
# Each moves its terms by one gap of the largest activation, and with it a sum by less than a gap of the largest sum;
# twice that for two of them.
INT8_ACTIVATIONS = 2 * INT8_GAP

# Logits of a small model in half precision, in units of eps and of the largest logit. Some 30 activations in a row are
# rounded, each by eps / 2 of its size: √30 / 2 = 3 typically, times 4 for the largest of some thousand.
HALF_PRECISION_MODEL = 12

# Norm of the error of a parameter's gradient in such a model, in units of eps and of the gradient's norm: some 30
# roundings forward and twice as many backward, √90 / 2 = 5 typically, times 3 because the gradients of what all
# positions and tasks share cancel in part.
HALF_PRECISION_GRADIENT = 15

# Norm of at most 20,000 float32 entries: half of the error of the sum of their squares, which are positive, so that it
# is off by √20,000·u = 8e-6 typically where lanes are summed one term after another. An entry that is left after a bias
# of its own size was subtracted is off by 3·u more.
NORM_FLOAT32 = 1e-5

# The same in float16, for entries twice the size of the bias: each is rounded by u of at most 1.5 times its size.
FLOAT16_WITHOUT_BIAS = EPS_FLOAT16

# Weights of a small model in float32 after three steps of SGD in two processes, whose gradients are averaged, against
# one process, which sums over all rows at once: gradients below 1 whose sums of some hundred terms are off by √100·u,
# three times, times a learning rate of 0.1, and the rounding of the weights of size 1: 2e-6, and five times that.
TWO_PROCESSES = 1e-5
