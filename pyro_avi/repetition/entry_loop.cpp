// Turns of a compiled graph: each is given its numbers, its rows and its draws, and leaves its loss.
//
// The library of a graph makes a tensor for every buffer, every view and every input at every turn, which takes longer than the
// arithmetic of a small graph. As turns differ in nothing but numbers, those of the first one are kept and given again: the calls by
// which the library asks torch for tensors are led here.
//
// No header of torch is needed, which would take ten times as long to compile: what is called of it comes as pointers.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <utility>
#include <vector>

#ifdef __linux__
#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

struct Tensor;
using Handle = Tensor*;
using Sizes = const int64_t*;

// Functions of torch, and of Python.
struct Torch {
    int32_t (*new_handle)(Handle, Handle*);
    int32_t (*delete_handle)(Handle);
    int32_t (*data)(Handle, void**);
    int32_t (*empty)(int64_t, Sizes, Sizes, int32_t, int32_t, int32_t, Handle*);
    int32_t (*view)(Handle, int64_t, Sizes, Sizes, int64_t, Handle*);
    void* (*python_error)();
};

static Torch torch;

extern "C" void set_torch(const Torch* given) { torch = *given; }

// A tensor of a graph: what it was made of, and how.
struct Kept {
    Handle of;
    int64_t how;
    Handle made;
};

// The tensors of one graph, in the order in which it makes them; of buffers at most so many bytes: they have memory of their own,
// where a graph would use some for several.
class Memory {
public:
    Memory(const Handle* inputs, int64_t count, int64_t most) : table_(64, nullptr), most_(most) {
        for (int64_t i = 0; i < count; ++i) add(inputs[i]);
    }

    ~Memory() {
        for (const Kept& each : kept_) torch.delete_handle(each.made);
    }

    void begin() { next_ = 0; }
    void end() { records_ = false; }

    bool knows(Handle handle) const { return table_[slot(handle)] == handle; }

    // A tensor made by a function, or the one that it made in the first turn.
    template <class Make>
    int32_t again(Handle of, int64_t how, int64_t bytes, Handle* result, const Make& make) {
        if (of && !knows(of)) return make(result);
        if (next_ < kept_.size() && kept_[next_].of == of && kept_[next_].how == how) {
            *result = kept_[next_++].made;
            return 0;
        }
        if (!records_ || bytes_ + bytes > most_) return make(result);
        if (int32_t error = make(result)) return error;
        bytes_ += bytes;
        kept_.push_back({of, how, *result});
        next_ = kept_.size();
        add(*result);
        return 0;
    }

private:
    size_t slot(Handle handle) const {
        size_t at = (reinterpret_cast<size_t>(handle) >> 4) * 0x9E3779B97F4A7C15u >> 32;
        for (at &= table_.size() - 1; table_[at] && table_[at] != handle; at = (at + 1) & (table_.size() - 1)) {}
        return at;
    }

    void add(Handle handle) {
        if (knows(handle)) return;
        if (2 * ++known_ > table_.size()) {
            std::vector<Handle> before(2 * table_.size(), nullptr);
            before.swap(table_);
            for (Handle each : before) {
                if (each) table_[slot(each)] = each;
            }
        }
        table_[slot(handle)] = handle;
    }

    std::vector<Kept> kept_;
    std::vector<Handle> table_;
    size_t known_ = 0, next_ = 0;
    int64_t bytes_ = 0, most_;
    bool records_ = true;
};

static thread_local Memory* memory = nullptr;

static int64_t mixed(int64_t how, int64_t count, Sizes sizes, Sizes strides) {
    for (int64_t i = 0; i < count; ++i) how = (how * 1000003 + sizes[i]) * 1000003 + strides[i];
    return how;
}

static int32_t new_handle(Handle of, Handle* result) {
    auto make = [&](Handle* made) { return torch.new_handle(of, made); };
    return memory ? memory->again(of, -1, 0, result, make) : make(result);
}

static int32_t delete_handle(Handle handle) {
    return memory && memory->knows(handle) ? 0 : torch.delete_handle(handle);
}

static int32_t empty(int64_t count, Sizes sizes, Sizes strides, int32_t dtype, int32_t device, int32_t index, Handle* result) {
    auto make = [&](Handle* made) { return torch.empty(count, sizes, strides, dtype, device, index, made); };
    if (!memory) return make(result);
    int64_t bytes = sizeof(double);
    for (int64_t i = 0; i < count; ++i) bytes *= sizes[i];
    return memory->again(nullptr, mixed(dtype, count, sizes, strides), bytes, result, make);
}

static int32_t view(Handle of, int64_t count, Sizes sizes, Sizes strides, int64_t offset, Handle* result) {
    auto make = [&](Handle* made) { return torch.view(of, count, sizes, strides, offset, made); };
    return memory ? memory->again(of, mixed(offset, count, sizes, strides), 0, result, make) : make(result);
}

extern "C" Memory* new_memory(const Handle* inputs, int64_t count, int64_t most) { return new Memory(inputs, count, most); }

extern "C" void delete_memory(Memory* given) { delete given; }

// Whether a function that a library calls leaves the tensors that it is given to the library. Others, as torch's dispatcher and
// functions of Python, take them over and delete them: they may not be given tensors that are kept.
static bool only_borrows(const char* name) {
    const char* torch_alone = "aoti_torch_";
    if (!std::strncmp(name, "PyObject_Call", 13)) return false;
    if (std::strncmp(name, torch_alone, std::strlen(torch_alone))) return true;
    for (const char* known : {"cpu_", "device_type_", "dtype_", "layout_", "get_", "new_tensor_handle", "delete_tensor_object",
                              "empty_strided", "_reinterpret_tensor"}) {
        if (!std::strncmp(name + std::strlen(torch_alone), known, std::strlen(known))) return true;
    }
    return false;
}

// Lead the calls of a library by which it makes tensors here; returns how many functions were found, 0 on other systems, and where
// the library calls functions that take tensors over. Outside of `take_turns` they go on to torch.
extern "C" int64_t lead_here(void* library) {
    int64_t found = 0;
#if defined(__linux__) && __SIZEOF_POINTER__ == 8
    struct {
        const char* name;
        void* function;
    } led[] = {
        {"aoti_torch_new_tensor_handle", reinterpret_cast<void*>(new_handle)},
        {"aoti_torch_delete_tensor_object", reinterpret_cast<void*>(delete_handle)},
        {"aoti_torch_empty_strided", reinterpret_cast<void*>(empty)},
        {"aoti_torch__reinterpret_tensor", reinterpret_cast<void*>(view)},
    };
    link_map* map = nullptr;
    if (dlinfo(library, RTLD_DI_LINKMAP, &map)) return 0;
    const char* names = nullptr;
    const Elf64_Sym* symbols = nullptr;
    // The table of calls, and that of all other addresses.
    const Elf64_Rela* tables[2] = {nullptr, nullptr};
    size_t bytes[2] = {0, 0};
    bool known = false;
    for (const Elf64_Dyn* entry = map->l_ld; entry->d_tag != DT_NULL; ++entry) {
        Elf64_Addr at = entry->d_un.d_ptr;
        const char* place = reinterpret_cast<const char*>(at < map->l_addr ? map->l_addr + at : at);
        switch (entry->d_tag) {
            case DT_STRTAB: names = place; break;
            case DT_SYMTAB: symbols = reinterpret_cast<const Elf64_Sym*>(place); break;
            case DT_JMPREL: tables[0] = reinterpret_cast<const Elf64_Rela*>(place); break;
            case DT_RELA: tables[1] = reinterpret_cast<const Elf64_Rela*>(place); break;
            case DT_PLTRELSZ: bytes[0] = entry->d_un.d_val; break;
            case DT_RELASZ: bytes[1] = entry->d_un.d_val; break;
            case DT_PLTREL: known = entry->d_un.d_val == DT_RELA; break;
        }
    }
    if (!names || !symbols || !known) return 0;
    std::vector<std::pair<const char*, const Elf64_Rela*>> calls;
    for (int i = 0; i < 2; ++i) {
        for (const Elf64_Rela* each = tables[i]; each < tables[i] + bytes[i] / sizeof(Elf64_Rela); ++each) {
            calls.emplace_back(names + symbols[ELF64_R_SYM(each->r_info)].st_name, each);
            if (!only_borrows(calls.back().first)) return 0;
        }
    }
    const size_t page = sysconf(_SC_PAGESIZE);
    for (const auto& [name, each] : calls) {
        for (const auto& [own, function] : led) {
            if (std::strcmp(name, own) || each->r_addend) continue;
            char* place = reinterpret_cast<char*>(map->l_addr + each->r_offset);
            char* start = place - reinterpret_cast<size_t>(place) % page;
            // Where the linker has made it read-only.
            if (mprotect(start, page, PROT_READ | PROT_WRITE)) return 0;
            std::memcpy(place, &function, sizeof function);
            ++found;
        }
    }
#endif
    return found;
}

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

struct Loop {
    // Takes the handles of its inputs over, and hands those of its outputs over.
    void (*entry)(Handle*, Handle*);
    // Of its library's tensors, where these are kept.
    Memory* memory;
    const Handle* inputs;
    int64_t num_inputs;
    const Rows* rows;
    int64_t num_rows;
    int64_t* index;
    int64_t batch;
    // Makes draws from a state of torch's generator.
    void (*draw_all)(void*, const void*, int64_t);
    const void* draws;
    int64_t num_draws;
    int32_t loss_is_double;
};

static void gather(const Loop& loop, const int64_t* positions) {
    for (int64_t i = 0; i < loop.num_rows; ++i) {
        const Rows& rows = loop.rows[i];
        for (int64_t row = 0; row < loop.batch; ++row) {
            std::memcpy(rows.to + row * rows.bytes, rows.from + positions[row] * rows.bytes, rows.bytes);
        }
    }
    if (loop.index) std::memcpy(loop.index, positions, loop.batch * sizeof(int64_t));
}

// Call the graph; its loss, false where something has failed.
static bool call(const Loop& loop, std::vector<Handle>& inputs, double* loss) {
    if (loop.memory) {
        std::memcpy(inputs.data(), loop.inputs, loop.num_inputs * sizeof(Handle));
        loop.memory->begin();
    } else {
        for (int64_t i = 0; i < loop.num_inputs; ++i) {
            if (torch.new_handle(loop.inputs[i], &inputs[i])) return false;
        }
    }
    Handle output = nullptr;
    void* found = nullptr;
    loop.entry(inputs.data(), &output);
    if (torch.python_error() || torch.data(output, &found)) return false;
    *loss = loop.loss_is_double ? *static_cast<double*>(found) : *static_cast<float*>(found);
    if (loop.memory) loop.memory->end();
    return !delete_handle(output);
}

// While there is one, the library's tensors are kept.
struct Keeping {
    explicit Keeping(Memory* given) { memory = given; }
    ~Keeping() { memory = nullptr; }
};

// Take turns until one has a loss that is not finite. Returns their number, or -1 with a message where one has failed.
extern "C" int64_t take_turns(const Loop* given, int64_t turns, void* random, const int64_t* positions, const Number* numbers,
                              int64_t num_numbers, double* losses, char* message, int64_t length) {
    const Loop& loop = *given;
    std::vector<Handle> inputs(loop.num_inputs);
    Keeping keeping(loop.memory);
    const char* failed = "an operation of torch";
    try {
        for (int64_t turn = 0; turn < turns; ++turn) {
            for (int64_t i = 0; i < num_numbers; ++i) {
                std::memcpy(numbers[i].to, numbers[i].from + turn * numbers[i].bytes, numbers[i].bytes);
            }
            if (positions) gather(loop, positions + turn * loop.batch);
            loop.draw_all(random, loop.draws, loop.num_draws);
            if (!call(loop, inputs, losses + turn)) throw failed;
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
