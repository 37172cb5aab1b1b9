// Softmax cross-entropy with label smoothing, and top-1 / top-5 counts. logits (K, N), labels (N).
//
//   p = softmax(logits[:, n])              q = (1 - smoothing) * onehot(label) + smoothing / K,
//                                          with mixup share * onehot(label) + (1 - share) * onehot(other label) for onehot
//   loss_n = -sum q * log p = log sum exp(l - max) - sum q * (l - max)
//   dlogits = scale * (p - q) / valid,     0 in the columns from `valid` on, which pad a last batch
//
//   rank_n = number of classes before the label in the order of falling logits; of equal logits the smaller class
//   comes first, a NaN before the label, and all before a label whose own logit is NaN: a network of NaNs is never right
//
// A label outside 0..K-1 makes the loss NaN: it can neither be missed nor read outside the array.
// Grid: one block, whose threads run along the batch, in lanes, and which adds it up.
#include "lanes.cuh"

// share * value, and of a share of 0 nothing, not even of a logit of -inf.
__device__ __forceinline__ lanes part(acc share, lanes value) { return share != 0 ? share * value : lanes{}; }

// sums: of losses, of rank < 1, of rank < 5. Without `mixed`, other_labels and share are not looked at.
template <bool WHOLE>
__device__ __forceinline__ void compute_columns(const real* __restrict__ logits, const int* __restrict__ labels,
                                                const int* __restrict__ other_labels, const acc* __restrict__ share,
                                                const acc* __restrict__ scale, real* __restrict__ dlogits, acc (&sums)[3],
                                                int classes, int batch, int valid, acc smoothing, int mixed) {
    const acc of_self = mixed ? *share : acc(1);
    const acc off = smoothing / classes, on = (1 - smoothing) * of_self, on_other = (1 - smoothing) * (1 - of_self);
    const acc factor = *scale / valid;
    lanes of_images[3] = {};
    LANE_LOOP(n, batch) {
        const int left = batch - n;
        const auto counts = numbers_from(n) < valid;
        const integers label = load_integers<WHOLE>(labels + n, left);
        const integers other = mixed ? load_integers<WHOLE>(other_labels + n, left) : label;
        const auto known = (label >= 0) & (label < classes) & (other >= 0) & (other < classes);
        lanes highest = load<WHOLE>(logits + n, left), of_label{}, of_other{};
        for (int k = 0; k < classes; ++k) {
            const lanes logit = load<WHOLE>(logits + (long long)k * batch + n, left);
            highest = logit > highest ? logit : highest;
            of_label = label == k ? logit : of_label;
            of_other = other == k ? logit : of_other;
        }
        lanes exp_sum{}, logit_sum{};
        integers rank{};
        for (int k = 0; k < classes; ++k) {
            const lanes logit = load<WHOLE>(logits + (long long)k * batch + n, left);
            exp_sum += exp(logit - highest);
            logit_sum += logit - highest;
            const auto behind = (logit < of_label) | ((logit == of_label) & (label <= k)) | (label == k);
            rank += behind ? integers{} : integers{} + 1;
        }
        const lanes loss = log(exp_sum) - part(on, of_label - highest) - part(on_other, of_other - highest) - part(off, logit_sum);
        of_images[0] += counts ? known ? loss : lanes{} + acc(NAN) : lanes{};
        of_images[1] += counts & known & (rank < 1) ? lanes{} + 1 : lanes{};
        of_images[2] += counts & known & (rank < 5) ? lanes{} + 1 : lanes{};
        for (int k = 0; k < classes; ++k) {
            const long long at = (long long)k * batch + n;
            const lanes p = exp(load<WHOLE>(logits + at, left) - highest) / exp_sum;
            const lanes of_labels = (label == k ? lanes{} + on : lanes{}) + (other == k ? lanes{} + on_other : lanes{});
            store<WHOLE>(dlogits + at, counts ? factor * (p - off - of_labels) : lanes{}, left);
        }
    }
    sum_each(of_images, sums);
}

// totals += (sum of losses, of rank < 1, of rank < 5, valid). float64, because an epoch is added up.
extern "C" __global__ void softmax_cross_entropy(const real* __restrict__ logits, const int* __restrict__ labels,
                                                 const int* __restrict__ other_labels, const acc* __restrict__ share,
                                                 const acc* __restrict__ scale, real* __restrict__ dlogits,
                                                 double* __restrict__ totals, int classes, int batch, int valid, acc smoothing,
                                                 int mixed) {
    acc sums[3];
    if (whole_lanes(batch)) compute_columns<true>(logits, labels, other_labels, share, scale, dlogits, sums, classes, batch,
                                                  valid, smoothing, mixed);
    else compute_columns<false>(logits, labels, other_labels, share, scale, dlogits, sums, classes, batch, valid, smoothing,
                                mixed);
    if (threadIdx.x == 0) {
        for (int i = 0; i < 3; ++i) totals[i] += sums[i];
        totals[3] += valid;
    }
}
