// Softmax cross-entropy with label smoothing, and top-1 / top-5 counts. logits (K, N), labels (N).
//
//   p = softmax(logits[:, n])              q = (1 - smoothing) * onehot(label) + smoothing / K,
//                                          with mixup share * onehot(label) + (1 - share) * onehot(other label) for onehot
//   loss_n = -sum q * log p = log sum exp(l - max) - sum q * (l - max)
//   dlogits = scale * (p - q) / valid,     0 in the columns from `valid` on, which pad a last batch
//
//   rank_n = number of classes before the label in the order of falling logits; of equal logits the smaller class
//   comes first, and NaN before everything, so that a network of NaNs is never right
//
// A label outside 0..K-1 makes the loss NaN: it can neither be missed nor read outside the array.
// Grid: columns are shared by all threads, then one block adds up the batch.
#include "common.cuh"

// Without `mixed`, other_labels and share are not looked at.
extern "C" __global__ void softmax_cross_entropy(const real* __restrict__ logits, const int* __restrict__ labels,
                                                 const int* __restrict__ other_labels, const acc* __restrict__ share,
                                                 const acc* __restrict__ scale, real* __restrict__ dlogits,
                                                 acc* __restrict__ losses, int* __restrict__ ranks, int classes, int batch,
                                                 int valid, acc smoothing, int mixed) {
    const acc of_self = mixed ? *share : acc(1);
    const acc off = smoothing / classes, on = (1 - smoothing) * of_self, on_other = (1 - smoothing) * (1 - of_self);
    GRID_LOOP(n, batch) {
        const bool counts = n < valid;
        const int label = labels[n], other = mixed ? other_labels[n] : label;
        const bool known = label >= 0 && label < classes && other >= 0 && other < classes;
        acc highest = acc(logits[n]);
        for (int k = 1; k < classes; ++k) {
            const acc logit = acc(logits[(long long)k * batch + n]);
            highest = logit > highest ? logit : highest;
        }
        const acc of_label = acc(logits[(long long)(known ? label : 0) * batch + n]);
        const acc of_other = acc(logits[(long long)(known ? other : 0) * batch + n]);
        acc exp_sum = 0, logit_sum = 0;
        int rank = 0;
        for (int k = 0; k < classes; ++k) {
            const acc logit = acc(logits[(long long)k * batch + n]);
            exp_sum += exp(logit - highest);
            logit_sum += logit - highest;
            const bool behind = logit < of_label || (logit == of_label && k >= label);
            rank += behind || k == label ? 0 : 1;
        }
        const acc of_pair = mixed ? on_other * (of_other - highest) : acc(0);
        const acc loss = log(exp_sum) - on * (of_label - highest) - of_pair - off * logit_sum;
        losses[n] = !counts ? acc(0) : known ? loss : acc(NAN);
        ranks[n] = counts && known ? rank : classes;
        const acc factor = counts ? *scale / valid : acc(0);
        for (int k = 0; k < classes; ++k) {
            const long long at = (long long)k * batch + n;
            const acc p = exp(acc(logits[at]) - highest) / exp_sum;
            const acc difference = p - off - (k == label ? on : acc(0)) - (k == other ? on_other : acc(0));
            dlogits[at] = real(counts ? factor * difference : acc(0));
        }
    }
}

// totals += (sum of losses, of rank < 1, of rank < 5, valid). One block. float64, because an epoch is added up.
extern "C" __global__ void loss_totals(const acc* __restrict__ losses, const int* __restrict__ ranks,
                                       double* __restrict__ totals, int batch, int valid) {
    acc loss = 0, first = 0, fifth = 0;
    BLOCK_LOOP_SUM(n, 0, batch, loss, first, fifth) {
        loss += losses[n];
        first += ranks[n] < 1 ? 1 : 0;
        fifth += ranks[n] < 5 ? 1 : 0;
    }
    loss = block_sum(loss);
    first = block_sum(first);
    fifth = block_sum(fifth);
    if (threadIdx.x == 0) {
        totals[0] += loss;
        totals[1] += first;
        totals[2] += fifth;
        totals[3] += valid;
    }
}
