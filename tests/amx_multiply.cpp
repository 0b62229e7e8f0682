// The AMX unit's `multiply` on all sorts of shapes, compared with plain loops. Values are small integers,
// so that sums in any order are exact; operands fill their memory to the last word, so that
// AddressSanitizer sees a step beyond. With FASTRES_EMULATE_AMX on any processor with AVX-512, else on AMX
// itself.
#define FASTRES_ISA avx512_amx
#include <sys/syscall.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <utility>
#include <vector>

#include "cpu/conv_multiply_amx.h"

namespace {

using namespace fastres::cpu;
using namespace fastres::cpu::avx512_amx;

constexpr int kBlock = 64;
constexpr float kUntouched = 12345;

struct Case {
    int rows, vectors;
    int64_t steps, run_count, row_stride;
    bool add;
    bool in_slots;  // a; and the runs of b are apart
};

uint32_t random_state = 1;
int random_integer() {  // -4 ... 4
    random_state = random_state * 1664525 + 1013904223;
    return static_cast<int>((random_state >> 16) % 9) - 4;
}

float word(float first, float second) {
    return bits_to_float(float_to_bits(first) >> 16 | float_to_bits(second));
}
float first_of(float word) {
    return bits_to_float(float_to_bits(word) << 16);
}
float second_of(float word) {
    return bits_to_float(float_to_bits(word) & 0xffff0000u);
}

std::vector<float> random_words(int64_t count) {
    std::vector<float> words(count);
    for (float& w : words) {
        const float first = static_cast<float>(random_integer());
        w = word(first, static_cast<float>(random_integer()));
    }
    return words;
}

bool agrees(const Case& c) {
    const Slots slots(c.steps);
    const auto word_of = [&](int64_t step) {
        return c.in_slots ? step / slots.steps * Slots::kSize + step % slots.steps : step;
    };
    const int64_t run_distance = c.steps + 3, stride = kBlock + 16, b_distance = c.steps + c.in_slots;
    std::vector<int64_t> runs, b_runs;
    for (int64_t run = 0; run < c.run_count; ++run) {
        runs.push_back((c.run_count - 1 - run) * run_distance);  // not in the order of memory
        b_runs.push_back(run * b_distance * kBlock);
    }
    const int64_t a_words =
        (c.run_count - 1) * run_distance + (c.rows - 1) * c.row_stride + word_of(c.steps - 1) + 1;
    const int64_t b_words = ((c.run_count - 1) * b_distance + c.steps) * kBlock;
    const std::vector<float> a = random_words(a_words), b = random_words(b_words);
    std::vector<float> sums((c.rows - 1) * stride + kBlock, c.add ? 7 : kUntouched);
    std::vector<float> expected = sums;
    for (int row = 0; row < c.rows; ++row) {
        for (int lane = 0; lane < 16 * c.vectors; ++lane) {
            float sum = c.add ? 7 : 0;
            for (int64_t run = 0; run < c.run_count; ++run) {
                for (int64_t step = 0; step < c.steps; ++step) {
                    const float x = a[row * c.row_stride + runs[run] + word_of(step)];
                    const float y = b[b_runs[run] + step * kBlock + lane];
                    sum += first_of(x) * first_of(y) + second_of(x) * second_of(y);
                }
            }
            expected[row * stride + lane] = sum;
        }
    }
    multiply_amx<kBlock>({a.data(), c.row_stride, 1, runs.data(), c.run_count, c.steps, b.data(),
                          sums.data(), stride, c.rows, c.vectors, c.add,
                          c.in_slots ? b_runs.data() : nullptr, c.in_slots});
    if (sums == expected) return true;
    std::printf("wrong sums: %d rows, %d vectors, %ld runs of %ld steps, row stride %ld%s%s\n", c.rows,
                c.vectors, static_cast<long>(c.run_count), static_cast<long>(c.steps),
                static_cast<long>(c.row_stride), c.add ? ", added" : "", c.in_slots ? ", in slots" : "");
    return false;
}

bool agree_all() {
    for (int rows : {1, 2, 15, 16, 17, 28, 31, 32})
        for (int vectors = 1; vectors <= 4; ++vectors)
            for (int64_t steps : {1, 2, 7, 14, 15, 16, 17, 28, 32, 33, 49, 98})
                for (int64_t runs : {1, 3})
                    for (int64_t row_stride : {steps, steps + 5, steps / 2 + 1})
                        for (bool add : {false, true})
                            for (bool in_slots : {false, true})
                                if (!agrees({rows, vectors, steps, runs, row_stride, add, in_slots}))
                                    return false;
    return true;
}

// Calls of which each takes fewer rows, or narrower steps, than the one before; and the last one again,
// when others may have had the tiles.
bool agree_one_after_another() {
    const Case last{3, 2, 7, 1, 7, false, false};
    for (const auto& [rows, steps] : {std::pair{32, 32}, {17, 32}, {17, 28}, {3, 28}})
        if (!agrees({rows, 2, steps, 1, steps, false, false})) return false;
    if (!agrees(last)) return false;
    release_tiles();
    return agrees(last);
}

// One element of a product of two tiles, a row of pairs and a column of pairs.
float product(const std::vector<float>& a, const std::vector<float>& b) {
    std::vector<float> columns(a.size() * kBlock);
    for (size_t step = 0; step < b.size(); ++step) columns[step * kBlock] = b[step];
    std::vector<float> sums(kBlock);
    const int64_t run = 0, steps = static_cast<int64_t>(a.size());
    multiply_amx<kBlock>(
        {a.data(), steps, 1, &run, 1, steps, columns.data(), sums.data(), kBlock, 1, 1, false});
    return sums[0];
}

bool is(const char* what, float value, float expected) {
    if (value == expected || (std::isnan(value) && std::isnan(expected))) return true;
    std::printf("%s: %g, expected %g\n", what, value, expected);
    return false;
}

// What the processor's manual says of rounding, of subnormal numbers and of what is not finite.
bool rounds_as_documented() {
    const float large = std::ldexp(1.0f, 12), one = word(1, 1), inf = INFINITY;
    const float small = std::ldexp(1.0f, -70), subnormal = std::ldexp(1.0f, -130);
    // The even and the odd elements are added up apart: 2^24 + 1 is 2^24, and 2^24 + 3 is 2^24 + 4.
    return is("even and odd elements", product({word(large, 1), one, one}, {word(large, 1), one, one}),
              std::ldexp(1.0f, 24) + 4) &&
           is("to nearest even", product({word(large, 1)}, {word(large, 1)}), std::ldexp(1.0f, 24)) &&
           is("a subnormal operand", product({word(subnormal, 0)}, {word(large, 0)}), 0) &&
           is("a subnormal result", product({word(small, 0)}, {word(small * 2048, 0)}), 0) &&
           is("infinity", product({word(inf, 1)}, {word(1, 1)}), inf) &&
           is("infinity times zero", product({word(inf, 1)}, {word(0, 1)}), NAN);
}

}  // namespace

int main() {
#if !defined(FASTRES_EMULATE_AMX)
    constexpr long request_permission = 0x1023, tile_data = 18;
    if (syscall(SYS_arch_prctl, request_permission, tile_data) != 0) return 2;
#endif
    if (!rounds_as_documented() || !agree_one_after_another() || !agree_all()) return 1;
    release_tiles();
    std::puts("all sums agree");
    return 0;
}
