// Uniform and normal numbers as torch draws them on a CPU, many at a time.
//
// torch asks its generator for one number after another. What the generator does is the same operation on many words, and so is
// what turns its words into numbers: here both are loops that compilers vectorize. The generator is a Mersenne twister
// (Matsumoto and Nishimura, 1998), the normal numbers are those of Box and Muller (1958), in torch's order of words, so that the
// state that is left is torch's to the last bit, and numbers are torch's up to rounding.

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int kWords = 624, kShift = 397, kGroup = 16;
// Numbers that are drawn at a time: as many as stay in the nearest memory, in whole groups.
constexpr int64_t kBlock = 512;
constexpr double kTurn = 6.283185307179586;

// The state as `torch.get_rng_state` has it.
struct State {
    uint64_t seed;
    int32_t left;
    int32_t seeded;
    uint64_t next;
    uint64_t words[kWords];
    // Of two normal numbers that are drawn at once the second one, until it is asked for.
    double unused;
    double second;
    double unused_too;
    int32_t has_second;
};

inline uint32_t twisted(uint32_t one, uint32_t two) {
    const uint32_t mixed = (one & 0x80000000u) | (two & 0x7fffffffu);
    return (mixed >> 1) ^ ((0u - (two & 1u)) & 0x9908b0dfu);
}

inline uint32_t tempered(uint32_t word) {
    word ^= word >> 11;
    word ^= (word << 7) & 0x9d2c5680u;
    word ^= (word << 15) & 0xefc60000u;
    return word ^ (word >> 18);
}

class Generator {
public:
    explicit Generator(State* state) : state_(state), left_(state->left), next_(state->next) {
        for (int i = 0; i < kWords; ++i) words_[i] = static_cast<uint32_t>(state->words[i]);
    }

    ~Generator() {
        for (int i = 0; i < kWords; ++i) state_->words[i] = words_[i];
        state_->left = left_;
        state_->next = next_;
    }

    State& state() { return *state_; }

    void draw(uint32_t* drawn, int64_t count) {
        while (count > 0) {
            // There is always one word less than are left.
            if (left_ == 1) twist();
            const int64_t some = count < left_ - 1 ? count : left_ - 1;
            for (int64_t i = 0; i < some; ++i) drawn[i] = tempered(words_[next_ + i]);
            drawn += some;
            count -= some;
            next_ += some;
            left_ -= static_cast<int32_t>(some);
        }
    }

    // Uniform in [0, 1), by the lower 53 bits of two words.
    double uniform() {
        uint32_t drawn[2];
        draw(drawn, 2);
        const uint64_t both = static_cast<uint64_t>(drawn[0]) << 32 | drawn[1];
        return static_cast<double>(both & ((uint64_t{1} << 53) - 1)) * 0x1p-53;
    }

private:
    void twist() {
        for (int i = 0; i < kWords - kShift; ++i) words_[i] = words_[i + kShift] ^ twisted(words_[i], words_[i + 1]);
        for (int i = kWords - kShift; i < kWords - 1; ++i) {
            words_[i] = words_[i + kShift - kWords] ^ twisted(words_[i], words_[i + 1]);
        }
        words_[kWords - 1] = words_[kShift - 1] ^ twisted(words_[kWords - 1], words_[0]);
        left_ = kWords + 1;
        next_ = 0;
    }

    State* state_;
    uint32_t words_[kWords];
    int32_t left_;
    uint64_t next_;
};

// Uniform in [0, 1), by the lower 24 bits.
inline float unit(uint32_t word) { return static_cast<float>(static_cast<int32_t>(word & 0xffffffu)) * 0x1p-24f; }

// The logarithm of a number in (0, 1], 2^e m with m about 1, by the series of the inverse hyperbolic tangent.
inline float logarithm(float number) {
    int32_t bits;
    std::memcpy(&bits, &number, sizeof bits);
    const int32_t exponent = (bits - 0x3f3504f3) >> 23;
    bits -= exponent << 23;
    float m;
    std::memcpy(&m, &bits, sizeof m);
    const float s = (m - 1.0f) / (m + 1.0f), s2 = s * s;
    float series = 0.11111111f;
    series = series * s2 + 0.14285714f;
    series = series * s2 + 0.2f;
    series = series * s2 + 0.33333333f;
    return static_cast<float>(exponent) * 0.69314718f + 2.0f * (s + s * s2 * series);
}

// Groups of 16 words: eight for radii, and eight for angles.
void to_normals(const uint32_t* drawn, float* to, int64_t groups, float mean, float scale) {
    for (int64_t group = 0; group < groups; ++group, drawn += kGroup, to += kGroup) {
        for (int i = 0; i < kGroup / 2; ++i) {
            const float radius = scale * std::sqrt(-2.0f * logarithm(1.0f - unit(drawn[i])));
            // The angle in quarters of a turn, of which the nearest whole number is taken away.
            const float quarters = 4.0f * unit(drawn[i + kGroup / 2]);
            const int32_t nearest = static_cast<int32_t>(quarters + 0.5f);
            const float angle = (quarters - static_cast<float>(nearest)) * 1.57079633f, a2 = angle * angle;
            // Taylor's series.
            float sine = 2.7557319e-6f;
            sine = sine * a2 - 1.9841270e-4f;
            sine = sine * a2 + 8.3333333e-3f;
            sine = sine * a2 - 0.16666667f;
            sine = angle + angle * a2 * sine;
            float cosine = -2.7557319e-7f;
            cosine = cosine * a2 + 2.4801587e-5f;
            cosine = cosine * a2 - 1.3888889e-3f;
            cosine = cosine * a2 + 4.1666667e-2f;
            cosine = cosine * a2 - 0.5f;
            cosine = 1.0f + cosine * a2;
            const float one = nearest & 1 ? sine : cosine, two = nearest & 1 ? cosine : sine;
            to[i] = radius * ((nearest + 1) & 2 ? -one : one) + mean;
            to[i + kGroup / 2] = radius * (nearest & 2 ? -two : two) + mean;
        }
    }
}

void fill_normal(Generator& generator, float* to, int64_t count, double mean, double scale) {
    uint32_t drawn[kBlock];
    for (int64_t done = 0; done < count; done += kBlock) {
        const int64_t some = count - done < kBlock ? count - done : kBlock;
        generator.draw(drawn, some);
        to_normals(drawn, to + done, some / kGroup, static_cast<float>(mean), static_cast<float>(scale));
    }
    // The last group has words of its own, whatever of it was drawn before.
    if (count % kGroup != 0) {
        generator.draw(drawn, kGroup);
        to_normals(drawn, to + count - kGroup, 1, static_cast<float>(mean), static_cast<float>(scale));
    }
}

void fill_normal(Generator& generator, double* to, int64_t count, double mean, double scale) {
    for (int64_t i = 0; i < count; ++i) to[i] = generator.uniform();
    auto transform = [&](double* group) {
        for (int i = 0; i < kGroup / 2; ++i) {
            const double radius = std::sqrt(-2.0 * std::log(1.0 - group[i])), angle = kTurn * group[i + kGroup / 2];
            group[i] = radius * std::cos(angle) * scale + mean;
            group[i + kGroup / 2] = radius * std::sin(angle) * scale + mean;
        }
    };
    for (int64_t i = 0; i + kGroup <= count; i += kGroup) transform(to + i);
    if (count % kGroup != 0) {
        double* last = to + count - kGroup;
        for (int i = 0; i < kGroup; ++i) last[i] = generator.uniform();
        transform(last);
    }
}

// Of fewer numbers than a group torch draws two at a time, in double precision, and keeps the second one.
double normal(Generator& generator) {
    State& state = generator.state();
    if (state.has_second) {
        state.has_second = 0;
        return state.second;
    }
    const double angle = kTurn * generator.uniform(), radius = std::sqrt(-2.0 * std::log1p(-generator.uniform()));
    state.second = radius * std::sin(angle);
    state.has_second = 1;
    return radius * std::cos(angle);
}

void fill_uniform(Generator& generator, float* to, int64_t count, double from, double until) {
    const float start = static_cast<float>(from), width = static_cast<float>(until) - start;
    uint32_t drawn[kBlock];
    for (int64_t done = 0; done < count; done += kBlock) {
        const int64_t some = count - done < kBlock ? count - done : kBlock;
        generator.draw(drawn, some);
        for (int64_t i = 0; i < some; ++i) to[done + i] = unit(drawn[i]) * width + start;
    }
}

void fill_uniform(Generator& generator, double* to, int64_t count, double from, double until) {
    for (int64_t i = 0; i < count; ++i) to[i] = generator.uniform() * (until - from) + from;
}

template <class Number>
void fill(Generator& generator, Number* to, int64_t count, bool is_normal, double one, double two) {
    if (!is_normal) {
        fill_uniform(generator, to, count, one, two);
    } else if (count >= kGroup) {
        fill_normal(generator, to, count, one, two);
    } else {
        for (int64_t i = 0; i < count; ++i) to[i] = static_cast<Number>(normal(generator) * two + one);
    }
}

}  // namespace

// Numbers to be drawn: normal ones of a mean and a scale, or uniform ones between two bounds.
struct Draw {
    void* to;
    int64_t count;
    double one, two;
    int32_t is_normal, is_double;
};

extern "C" void draw_all(void* state, const Draw* draws, int64_t count) {
    Generator generator(static_cast<State*>(state));
    for (const Draw* each = draws; each < draws + count; ++each) {
        if (each->is_double) {
            fill(generator, static_cast<double*>(each->to), each->count, each->is_normal, each->one, each->two);
        } else {
            fill(generator, static_cast<float*>(each->to), each->count, each->is_normal, each->one, each->two);
        }
    }
}
