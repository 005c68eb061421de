// Choosing a token per row of logits, without sorting the vocabulary.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <vector>

#include "ops.h"
#include "threads.h"

#define TURBOLM_EXPORT extern "C" __attribute__((visibility("default")))

namespace turbolm {
namespace {

constexpr int64_t kChunk = 1024;   // numbers behind each of the sums of Kernels::exponentials
constexpr double kRounded = 0.999;  // a float32 sum of them may be smaller than their true sum by less

struct SampleCall {
    const float* logits;  // [rows, vocabulary]
    int64_t rows, vocabulary;
    const float* temperature;  // [rows]; 0: the likeliest token; null: for all rows
    const int64_t* top_k;      // [rows]; 0: all
    const float* top_p;        // [rows]
    const float* min_p;        // [rows]
    const double* uniform;     // [rows], in [0, 1)
    int64_t* tokens;           // [rows]; -1: the row has no distribution (NaN, or -inf alone)
};

// The smallest of the `wanted` largest numbers of [first, last), which it reorders.
float nth_largest(float* first, float* last, int64_t wanted) {
    std::nth_element(first, first + wanted - 1, last, std::greater<float>());
    return first[wanted - 1];
}

// The largest value whose own weight and that of all larger ones reach `mass`. Reorders the
// numbers. Halves the candidates around a pivot until one is left: linear time on average.
float mass_cutoff(float* first, float* last, double mass) {
    double above = 0.0;  // weight of all numbers larger than the candidates
    while (last - first > 1) {
        float* middle = first + (last - first) / 2;
        std::nth_element(first, middle, last, std::greater<float>());
        double upper = 0.0;  // candidates before the middle: the larger half
        for (const float* p = first; p < middle; ++p) upper += *p;
        if (above + upper >= mass) {
            last = middle;
        } else {
            above += upper;
            first = middle;
        }
    }
    return *first;
}

class RowSampler {
  public:
    explicit RowSampler(int64_t vocabulary)
        : p_(new float[vocabulary]), sums_(new double[(vocabulary + kChunk - 1) / kChunk]), size_(vocabulary) {}

    int64_t sample(const float* logits, float temperature, int64_t top_k, float top_p, float min_p, double uniform) {
        const int64_t best = kernels().argmax(logits, size_);
        if (best < 0 || temperature == 0.0f || logits[best] == std::numeric_limits<float>::infinity()) return best;
        kernels().exponentials(logits, size_, logits[best], 1.0f / temperature, p_.get(), sums_.get());
        const float cutoff = std::max(min_p, filter(top_k, top_p));  // the largest p is 1
        return draw(cutoff, uniform);
    }

  private:
    int64_t num_chunks() const { return (size_ + kChunk - 1) / kChunk; }

    double total() const {
        double sum = 0.0;
        for (int64_t i = 0; i < num_chunks(); ++i) sum += sums_[i];
        return sum;
    }

    // The smallest p that top-k, and top-p of what top-k left, keep.
    float filter(int64_t top_k, float top_p) {
        const bool has_k = top_k > 0 && top_k < size_;
        if (!has_k && top_p >= 1.0f) return 0.0f;
        const double whole = total();
        // Few tokens carry nearly all weight: look among these first, then among ever more.
        for (float floor = 1e-3f;; floor = floor > 1e-30f ? floor * 1e-4f : 0.0f) {
            collect(floor);
            const int64_t count = static_cast<int64_t>(candidates_.size());
            if (has_k ? count < top_k && floor > 0.0f : weight() < top_p * whole && floor > 0.0f) continue;
            float cutoff = 0.0f;
            if (has_k && count >= top_k) {
                cutoff = nth_largest(candidates_.data(), candidates_.data() + count, top_k);
                candidates_.resize(top_k);
            }
            if (top_p >= 1.0f) return cutoff;
            const double mass = top_p * (has_k ? weight() : whole);
            return std::max(cutoff, mass_cutoff(candidates_.data(), candidates_.data() + candidates_.size(), mass));
        }
    }

    int64_t chunk_end(int64_t chunk) const { return std::min(size_, (chunk + 1) * kChunk); }

    void collect(float floor) {
        candidates_.clear();
        for (int64_t chunk = 0; chunk < num_chunks(); ++chunk) {
            if (sums_[chunk] < kRounded * floor) continue;  // none of them reaches it
            for (int64_t i = chunk * kChunk; i < chunk_end(chunk); ++i) {
                if (p_[i] >= floor && p_[i] > 0.0f) candidates_.push_back(p_[i]);
            }
        }
    }

    double weight() const {
        double sum = 0.0;
        for (const float p : candidates_) sum += p;
        return sum;
    }

    // The token where the running sum of kept weights, in the order of token ids, passes uniform * all.
    int64_t draw(float cutoff, double uniform) {
        if (cutoff > 0.0f) {
            for (int64_t chunk = 0; chunk < num_chunks(); ++chunk) {
                double sum = 0.0;
                for (int64_t i = chunk * kChunk; sums_[chunk] >= kRounded * cutoff && i < chunk_end(chunk); ++i) {
                    if (p_[i] >= cutoff) sum += p_[i];
                }
                sums_[chunk] = sum;
            }
        }
        const double target = uniform * total();
        double sum = 0.0;
        for (int64_t chunk = 0; chunk < num_chunks(); ++chunk) {
            if (sum + sums_[chunk] <= target && chunk + 1 < num_chunks()) {
                sum += sums_[chunk];
                continue;
            }
            for (int64_t i = chunk * kChunk; i < chunk_end(chunk); ++i) {
                if (p_[i] < cutoff || p_[i] == 0.0f) continue;
                sum += p_[i];
                if (sum > target) return i;
            }
        }
        for (int64_t i = size_ - 1; i >= 0; --i) {  // rounding left the target past the last kept token
            if (p_[i] >= cutoff && p_[i] > 0.0f) return i;
        }
        return -1;
    }

    std::unique_ptr<float[]> p_;      // weights relative to the likeliest token's
    std::unique_ptr<double[]> sums_;  // of kChunk weights each
    std::vector<float> candidates_;
    int64_t size_;
};

void sample_rows(void* argument, const Team& team) {
    const SampleCall& call = *static_cast<const SampleCall*>(argument);
    int64_t first, last;
    share(team, call.rows, 1, &first, &last);
    if (first == last) return;
    RowSampler sampler(call.vocabulary);
    for (int64_t row = first; row < last; ++row) {
        const float* logits = call.logits + row * call.vocabulary;
        call.tokens[row] = sampler.sample(logits, call.temperature[row], call.top_k[row], call.top_p[row],
                                          call.min_p[row], call.uniform[row]);
    }
}

// A single row is no work for a team.
void run(ThreadTeam* team, void (*function)(void*, const Team&), SampleCall& call) {
    if (call.rows == 1) return function(&call, Team{0, 1, nullptr});
    team->run(function, &call);
}

void argmax_rows(void* argument, const Team& team) {
    const SampleCall& call = *static_cast<const SampleCall*>(argument);
    int64_t first, last;
    share(team, call.rows, 1, &first, &last);
    for (int64_t row = first; row < last; ++row) {
        call.tokens[row] = kernels().argmax(call.logits + row * call.vocabulary, call.vocabulary);
    }
}

}  // namespace
}  // namespace turbolm

using namespace turbolm;

// turbolm/ops/sampling.py says what the parameters mean.
TURBOLM_EXPORT void turbolm_sample(ThreadTeam* team, const float* logits, int64_t rows, int64_t vocabulary,
                                   const float* temperature, const int64_t* top_k, const float* top_p,
                                   const float* min_p, const double* uniform, int64_t* tokens) {
    SampleCall call{logits, rows, vocabulary, temperature, top_k, top_p, min_p, uniform, tokens};
    run(team, sample_rows, call);
}

TURBOLM_EXPORT void turbolm_argmax(ThreadTeam* team, const float* logits, int64_t rows, int64_t vocabulary,
                                   int64_t* tokens) {
    SampleCall call{logits, rows, vocabulary, nullptr, nullptr, nullptr, nullptr, nullptr, tokens};
    run(team, argmax_rows, call);
}
