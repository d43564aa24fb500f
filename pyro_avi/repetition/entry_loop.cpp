// Turns of a compiled graph: each is given its numbers, its rows and its draws, and leaves its loss.
//
// No header of torch is needed, which would take ten times as long to compile: what is called of it comes as pointers.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <vector>

struct Tensor;
using Handle = Tensor*;

// What is written anew before every turn: `from` holds `bytes` for each.
struct Number {
    char* to;
    const char* from;
    int64_t bytes;
};

// The rows of a batch, of `bytes` each.
struct Rows {
    char* to;
    const char* from;
    int64_t bytes;
};

// A random operation in place, of two numbers.
struct Draw {
    const char* operation;
    Handle tensor;
    double one, two;
};

struct Loop {
    int32_t (*new_handle)(Handle, Handle*);
    int32_t (*delete_handle)(Handle);
    int32_t (*data)(Handle, void**);
    int32_t (*dispatch)(const char*, const char*, uint64_t*);
    void* (*python_error)();
    // Takes the handles of its inputs over, and hands those of its outputs over.
    void (*entry)(Handle*, Handle*);
    const Handle* inputs;
    int64_t num_inputs;
    const Rows* rows;
    int64_t num_rows;
    int64_t* index;
    int64_t batch;
    const Draw* draws;
    int64_t num_draws;
    int32_t loss_is_double;
};

static bool draw(const Loop& loop, const Draw& drawn) {
    Handle own = nullptr;
    if (loop.new_handle(drawn.tensor, &own)) return false;
    // The arguments, of which the tensor is taken over; no generator, which is torch's own.
    uint64_t stack[4] = {reinterpret_cast<uint64_t>(own), 0, 0, 0};
    std::memcpy(&stack[1], &drawn.one, sizeof(double));
    std::memcpy(&stack[2], &drawn.two, sizeof(double));
    if (loop.dispatch(drawn.operation, "", stack)) return false;
    return !loop.delete_handle(reinterpret_cast<Handle>(stack[0]));
}

static void gather(const Loop& loop, const int64_t* positions) {
    for (int64_t i = 0; i < loop.num_rows; ++i) {
        const Rows& rows = loop.rows[i];
        for (int64_t row = 0; row < loop.batch; ++row) {
            std::memcpy(rows.to + row * rows.bytes, rows.from + positions[row] * rows.bytes, rows.bytes);
        }
    }
    if (loop.index) std::memcpy(loop.index, positions, loop.batch * sizeof(int64_t));
}

static bool loss_of(const Loop& loop, Handle output, double* loss) {
    void* found = nullptr;
    if (loop.data(output, &found)) return false;
    *loss = loop.loss_is_double ? *static_cast<double*>(found) : *static_cast<float*>(found);
    return !loop.delete_handle(output);
}

// Take turns until one has a loss that is not finite. Returns their number, or -1 with a message where one has failed.
extern "C" int64_t take_turns(const Loop* given, int64_t turns, const int64_t* positions, const Number* numbers,
                              int64_t num_numbers, double* losses, char* message, int64_t length) {
    const Loop& loop = *given;
    std::vector<Handle> inputs(loop.num_inputs);
    const char* failed = "an operation of torch";
    try {
        for (int64_t turn = 0; turn < turns; ++turn) {
            for (int64_t i = 0; i < num_numbers; ++i) {
                std::memcpy(numbers[i].to, numbers[i].from + turn * numbers[i].bytes, numbers[i].bytes);
            }
            if (positions) gather(loop, positions + turn * loop.batch);
            for (int64_t i = 0; i < loop.num_draws; ++i) {
                if (!draw(loop, loop.draws[i])) throw failed;
            }
            for (int64_t i = 0; i < loop.num_inputs; ++i) {
                if (loop.new_handle(loop.inputs[i], &inputs[i])) throw failed;
            }
            Handle output = nullptr;
            loop.entry(inputs.data(), &output);
            if (loop.python_error()) return -1;
            if (!loss_of(loop, output, losses + turn)) throw failed;
            if (!std::isfinite(losses[turn])) return turn + 1;
        }
        return turns;
    } catch (const std::exception& error) {
        std::snprintf(message, length, "%s", error.what());
    } catch (const char* what) {
        std::snprintf(message, length, "%s", what);
    } catch (...) {
        std::snprintf(message, length, "an unknown error");
    }
    return -1;
}
