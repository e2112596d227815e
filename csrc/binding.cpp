// The launchers as Python functions: keyword-only, pointers and streams as integers (tensor.data_ptr(),
// stream.cuda_stream). Checks for users are in magihuman_fast/kernels/ops.py. Built twice: as magihuman_fast.kernels._C over the
// kernel library and as magihuman_fast._sim over the simulator.
#include <pybind11/pybind11.h>

#include "api.h"

#if defined(MAGIHUMAN_SIM)
#include "sim/instructions.h"
#endif

namespace py = pybind11;
using namespace magihuman;

namespace {

using Address = uintptr_t;

// For parameters of any pointer type.
struct Pointer {
    Address address;
    template <typename T>
    operator T*() const {
        return reinterpret_cast<T*>(address);
    }
};

Pointer at(Address address) { return {address}; }

constexpr auto kWithoutLock = py::call_guard<py::gil_scoped_release>();

void define_products(py::module_& m) {
#define GEMM_PARAMETERS                                                                 \
    Address a, int64_t lda, Address w, int64_t ldw, int rows, int n, int k, int groups, \
        Address modality_offsets, int num_sms
#define GEMM_STRUCT {at(a), lda, at(w), ldw, rows, n, k, groups, at(modality_offsets), num_sms}
#define GEMM_NAMES                                                                                         \
    py::kw_only(), py::arg("a"), py::arg("lda"), py::arg("w"), py::arg("ldw"), py::arg("m"), py::arg("n"), \
        py::arg("k"), py::arg("groups"), py::arg("modality_offsets"), py::arg("num_sms")
    m.def(
        "gemm",
        [](GEMM_PARAMETERS, Address d, int64_t ldd, Address stream) {
            launch_gemm({.g = GEMM_STRUCT, .d = at(d), .ldd = ldd}, at(stream));
        },
        GEMM_NAMES, py::arg("d"), py::arg("ldd"), py::arg("stream"), kWithoutLock);
    m.def(
        "gemm_residual",
        [](GEMM_PARAMETERS, Address x, int64_t ldx, Address stream) {
            launch_gemm_residual({.g = GEMM_STRUCT, .x = at(x), .ldx = ldx}, at(stream));
        },
        GEMM_NAMES, py::arg("x"), py::arg("ldx"), py::arg("stream"), kWithoutLock);
    m.def(
        "gemm_gelu7",
        [](GEMM_PARAMETERS, Address d, int64_t ldd, Address stream) {
            launch_gemm_gelu7({.g = GEMM_STRUCT, .d = at(d), .ldd = ldd}, at(stream));
        },
        GEMM_NAMES, py::arg("d"), py::arg("ldd"), py::arg("stream"), kWithoutLock);
    m.def(
        "gemm_swiglu7",
        [](GEMM_PARAMETERS, Address d, int64_t ldd, int d_cols, Address stream) {
            launch_gemm_swiglu7({.g = GEMM_STRUCT, .d = at(d), .ldd = ldd, .d_cols = d_cols}, at(stream));
        },
        GEMM_NAMES, py::arg("d"), py::arg("ldd"), py::arg("d_cols"), py::arg("stream"), kWithoutLock);
    m.def(
        "gemm_qkv",
        [](GEMM_PARAMETERS, int num_q_heads, int num_kv_heads, Address q_norm, Address k_norm, Address rope,
           Address q, Address k_out, Address v, Address gate, Address stream) {
            launch_gemm_qkv({.g = GEMM_STRUCT,
                             .num_q_heads = num_q_heads,
                             .num_kv_heads = num_kv_heads,
                             .q_norm = at(q_norm),
                             .k_norm = at(k_norm),
                             .rope = at(rope),
                             .q = at(q),
                             .k = at(k_out),
                             .v = at(v),
                             .gate = at(gate)},
                            at(stream));
        },
        GEMM_NAMES, py::arg("num_q_heads"), py::arg("num_kv_heads"), py::arg("q_norm"), py::arg("k_norm"),
        py::arg("rope"), py::arg("q"), py::arg("k_out"), py::arg("v"), py::arg("gate"), py::arg("stream"),
        kWithoutLock);
#undef GEMM_PARAMETERS
#undef GEMM_STRUCT
#undef GEMM_NAMES
}

void define_attention(py::module_& m) {
    m.def(
        "gated_attention",
        [](Address q, Address k, Address v, Address gate, Address out, int rows, int num_q_heads,
           int num_kv_heads, Address modality_offsets, int tokens_per_frame, int frame_window,
           bool text_queries, int num_sms, int tile, Address stream) {
            launch_gated_attention({.q = at(q),
                                    .k = at(k),
                                    .v = at(v),
                                    .gate = at(gate),
                                    .out = at(out),
                                    .m = rows,
                                    .num_q_heads = num_q_heads,
                                    .num_kv_heads = num_kv_heads,
                                    .modality_offsets = at(modality_offsets),
                                    .tokens_per_frame = tokens_per_frame,
                                    .frame_window = frame_window,
                                    .text_queries = text_queries,
                                    .num_sms = num_sms,
                                    .tile = tile},
                                   at(stream));
        },
        py::kw_only(), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("gate"), py::arg("out"),
        py::arg("m"), py::arg("num_q_heads"), py::arg("num_kv_heads"), py::arg("modality_offsets"),
        py::arg("tokens_per_frame"), py::arg("frame_window"), py::arg("text_queries"), py::arg("num_sms"),
        py::arg("tile"), py::arg("stream"), kWithoutLock);
}

void define_rows(py::module_& m) {
    m.def(
        "rms_norm",
        [](Address x, int64_t ldx, Address weight, Address out, int64_t ldout, int rows, int h, int groups,
           Address modality_offsets, float eps, int num_sms, Address stream) {
            launch_rms_norm({.x = at(x),
                             .ldx = ldx,
                             .weight = at(weight),
                             .out = at(out),
                             .ldout = ldout,
                             .m = rows,
                             .h = h,
                             .groups = groups,
                             .modality_offsets = at(modality_offsets),
                             .eps = eps,
                             .num_sms = num_sms},
                            at(stream));
        },
        py::kw_only(), py::arg("x"), py::arg("ldx"), py::arg("weight"), py::arg("out"), py::arg("ldout"),
        py::arg("m"), py::arg("h"), py::arg("groups"), py::arg("modality_offsets"), py::arg("eps"),
        py::arg("num_sms"), py::arg("stream"), kWithoutLock);
    m.def(
        "embed",
        [](Address video, int channels, int frames, int height, int width, Address audio, int audio_rows,
           int audio_channels, Address text, int text_rows, Address video_weight, Address video_bias,
           Address audio_weight, Address audio_bias, Address x, int64_t ldx, int rows, int h,
           Address modality_offsets, int num_sms, Address stream) {
            launch_embed({.video = at(video),
                          .grid = {channels, frames, height, width},
                          .audio = at(audio),
                          .audio_rows = audio_rows,
                          .audio_channels = audio_channels,
                          .text = at(text),
                          .text_rows = text_rows,
                          .video_weight = at(video_weight),
                          .video_bias = at(video_bias),
                          .audio_weight = at(audio_weight),
                          .audio_bias = at(audio_bias),
                          .x = at(x),
                          .ldx = ldx,
                          .m = rows,
                          .h = h,
                          .modality_offsets = at(modality_offsets),
                          .num_sms = num_sms},
                         at(stream));
        },
        py::kw_only(), py::arg("video"), py::arg("channels"), py::arg("frames"), py::arg("height"),
        py::arg("width"), py::arg("audio"), py::arg("audio_rows"), py::arg("audio_channels"), py::arg("text"),
        py::arg("text_rows"), py::arg("video_weight"), py::arg("video_bias"), py::arg("audio_weight"),
        py::arg("audio_bias"), py::arg("x"), py::arg("ldx"), py::arg("m"), py::arg("h"),
        py::arg("modality_offsets"), py::arg("num_sms"), py::arg("stream"), kWithoutLock);
    m.def(
        "embed_text",
        [](Address text, Address weight, Address bias, Address out, int rows, int channels, int h,
           int num_sms, Address stream) {
            launch_embed_text({.text = at(text),
                               .weight = at(weight),
                               .bias = at(bias),
                               .out = at(out),
                               .rows = rows,
                               .channels = channels,
                               .h = h,
                               .num_sms = num_sms},
                              at(stream));
        },
        py::kw_only(), py::arg("text"), py::arg("weight"), py::arg("bias"), py::arg("out"), py::arg("rows"),
        py::arg("channels"), py::arg("h"), py::arg("num_sms"), py::arg("stream"), kWithoutLock);
    m.def(
        "head",
        [](Address x, int64_t ldx, Address video_norm, Address audio_norm, Address video_weight,
           Address audio_weight, Address video, int channels, int frames, int height, int width,
           Address audio, int audio_rows, int audio_channels, int rows, int h, Address modality_offsets,
           float eps, int num_sms, Address stream) {
            launch_head({.x = at(x),
                         .ldx = ldx,
                         .video_norm = at(video_norm),
                         .audio_norm = at(audio_norm),
                         .video_weight = at(video_weight),
                         .audio_weight = at(audio_weight),
                         .video = at(video),
                         .grid = {channels, frames, height, width},
                         .audio = at(audio),
                         .audio_rows = audio_rows,
                         .audio_channels = audio_channels,
                         .m = rows,
                         .h = h,
                         .modality_offsets = at(modality_offsets),
                         .eps = eps,
                         .num_sms = num_sms},
                        at(stream));
        },
        py::kw_only(), py::arg("x"), py::arg("ldx"), py::arg("video_norm"), py::arg("audio_norm"),
        py::arg("video_weight"), py::arg("audio_weight"), py::arg("video"), py::arg("channels"),
        py::arg("frames"), py::arg("height"), py::arg("width"), py::arg("audio"), py::arg("audio_rows"),
        py::arg("audio_channels"), py::arg("m"), py::arg("h"), py::arg("modality_offsets"), py::arg("eps"),
        py::arg("num_sms"), py::arg("stream"), kWithoutLock);
}

void define_sampler(py::module_& m) {
    m.def(
        "renoise_step",
        [](Address x, Address velocity, Address noise, Address table, Address step, int64_t count, int steps,
           int num_sms, Address stream) {
            launch_renoise_step({.x = at(x),
                                 .velocity = at(velocity),
                                 .noise = at(noise),
                                 .table = at(table),
                                 .step = at(step),
                                 .count = count,
                                 .steps = steps,
                                 .num_sms = num_sms},
                                at(stream));
        },
        py::kw_only(), py::arg("x"), py::arg("velocity"), py::arg("noise"), py::arg("table"), py::arg("step"),
        py::arg("count"), py::arg("steps"), py::arg("num_sms"), py::arg("stream"), kWithoutLock);
    m.def(
        "clamp_image",
        [](Address video, Address image, int channels, int frames, int height, int width, int num_sms,
           Address stream) {
            launch_clamp_image({.video = at(video),
                                .image = at(image),
                                .grid = {channels, frames, height, width},
                                .num_sms = num_sms},
                               at(stream));
        },
        py::kw_only(), py::arg("video"), py::arg("image"), py::arg("channels"), py::arg("frames"),
        py::arg("height"), py::arg("width"), py::arg("num_sms"), py::arg("stream"), kWithoutLock);
    m.def(
        "unipc_step",
        [](Address x, Address velocity, Address null_velocity, Address guidance, Address x_last,
           Address history, Address table, Address step, int64_t count, int64_t frame_size, int frames,
           int steps, int num_sms, Address stream) {
            launch_unipc_step({.x = at(x),
                               .velocity = at(velocity),
                               .null_velocity = at(null_velocity),
                               .guidance = at(guidance),
                               .x_last = at(x_last),
                               .history = at(history),
                               .table = at(table),
                               .step = at(step),
                               .count = count,
                               .frame_size = frame_size,
                               .frames = frames,
                               .steps = steps,
                               .num_sms = num_sms},
                              at(stream));
        },
        py::kw_only(), py::arg("x"), py::arg("velocity"), py::arg("null_velocity"), py::arg("guidance"),
        py::arg("x_last"), py::arg("history"), py::arg("table"), py::arg("step"), py::arg("count"),
        py::arg("frame_size"), py::arg("frames"), py::arg("steps"), py::arg("num_sms"), py::arg("stream"),
        kWithoutLock);
    m.def(
        "advance_step", [](Address step, Address stream) { launch_advance_step({at(step)}, at(stream)); },
        py::kw_only(), py::arg("step"), py::arg("stream"), kWithoutLock);
}

void define_convolutions(py::module_& m) {
    // Keyword by keyword as everywhere; a buffer of frames is two of them.
#define CONV_PARAMETERS                                                                                \
    Address x, int x_frames, int height, int width, int in_channels, int length, int first, int count, \
        Address w, Address bias
#define CONV_NAMES                                                                                   \
    py::kw_only(), py::arg("x"), py::arg("x_frames"), py::arg("height"), py::arg("width"),           \
        py::arg("in_channels"), py::arg("length"), py::arg("first"), py::arg("count"), py::arg("w"), \
        py::arg("bias")
#define OUTPUT_PARAMETERS                                                                             \
    int channels, Address shortcut, int shortcut_frames, Address out, int out_frames, Address normed, \
        int normed_frames, float out_eps, float eps, int activation, int num_sms
#define OUTPUT_NAMES                                                                            \
    py::arg("channels"), py::arg("shortcut"), py::arg("shortcut_frames"), py::arg("out"),       \
        py::arg("out_frames"), py::arg("normed"), py::arg("normed_frames"), py::arg("out_eps"), \
        py::arg("eps"), py::arg("activation"), py::arg("num_sms")
#define CONV_STRUCT                   \
    {{at(x), x_frames},               \
     height,                          \
     width,                           \
     in_channels,                     \
     length,                          \
     first,                           \
     count,                           \
     at(w),                           \
     at(bias),                        \
     channels,                        \
     {at(shortcut), shortcut_frames}, \
     {at(out), out_frames},           \
     {at(normed), normed_frames},     \
     out_eps,                         \
     eps,                             \
     activation,                      \
     num_sms}
    m.def(
        "conv_3x3",
        [](CONV_PARAMETERS, OUTPUT_PARAMETERS, int time_taps, Address stream) {
            launch_conv_3x3({CONV_STRUCT, time_taps}, at(stream));
        },
        CONV_NAMES, OUTPUT_NAMES, py::arg("time_taps"), py::arg("stream"), kWithoutLock);
    m.def(
        "conv_1x1",
        [](CONV_PARAMETERS, OUTPUT_PARAMETERS, Address stream) { launch_conv_1x1(CONV_STRUCT, at(stream)); },
        CONV_NAMES, OUTPUT_NAMES, py::arg("stream"), kWithoutLock);
    m.def(
        "conv_upsample",
        [](CONV_PARAMETERS, OUTPUT_PARAMETERS, Address stream) {
            launch_conv_upsample(CONV_STRUCT, at(stream));
        },
        CONV_NAMES, OUTPUT_NAMES, py::arg("stream"), kWithoutLock);
    m.def(
        "conv_time",
        [](CONV_PARAMETERS, OUTPUT_PARAMETERS, int drop, Address stream) {
            launch_conv_time({CONV_STRUCT, drop}, at(stream));
        },
        CONV_NAMES, OUTPUT_NAMES, py::arg("drop"), py::arg("stream"), kWithoutLock);
    m.def(
        "conv_picture",
        [](CONV_PARAMETERS, Address frames, Address picture, int num_sms, Address stream) {
            launch_conv_picture({{at(x), x_frames},
                                 height,
                                 width,
                                 in_channels,
                                 length,
                                 first,
                                 count,
                                 at(w),
                                 at(bias),
                                 at(frames),
                                 at(picture),
                                 num_sms},
                                at(stream));
        },
        CONV_NAMES, py::arg("frames"), py::arg("picture"), py::arg("num_sms"), py::arg("stream"),
        kWithoutLock);
#undef CONV_PARAMETERS
#undef CONV_NAMES
#undef OUTPUT_PARAMETERS
#undef OUTPUT_NAMES
#undef CONV_STRUCT
    m.def(
        "channel_norm",
        [](Address x, int x_frames, Address normed, int normed_frames, Address plain, int plain_frames,
           int height, int width, int channels, int first, int count, float eps, float plain_eps,
           int activation, int num_sms, Address stream) {
            launch_channel_norm({{at(x), x_frames},
                                 {at(normed), normed_frames},
                                 {at(plain), plain_frames},
                                 height,
                                 width,
                                 channels,
                                 first,
                                 count,
                                 eps,
                                 plain_eps,
                                 activation,
                                 num_sms},
                                at(stream));
        },
        py::kw_only(), py::arg("x"), py::arg("x_frames"), py::arg("normed"), py::arg("normed_frames"),
        py::arg("plain"), py::arg("plain_frames"), py::arg("height"), py::arg("width"), py::arg("channels"),
        py::arg("first"), py::arg("count"), py::arg("eps"), py::arg("plain_eps"), py::arg("activation"),
        py::arg("num_sms"), py::arg("stream"), kWithoutLock);
    m.def(
        "latent_pixels",
        [](Address latent, Address mean, Address std, Address pixels, int channels, int frames, int height,
           int width, int first, int count, int num_sms, Address stream) {
            launch_latent_pixels({at(latent), at(mean), at(std), at(pixels), channels, frames, height, width,
                                  first, count, num_sms},
                                 at(stream));
        },
        py::kw_only(), py::arg("latent"), py::arg("mean"), py::arg("std"), py::arg("pixels"),
        py::arg("channels"), py::arg("frames"), py::arg("height"), py::arg("width"), py::arg("first"),
        py::arg("count"), py::arg("num_sms"), py::arg("stream"), kWithoutLock);
}

#if defined(MAGIHUMAN_SIM)
void define_simulator(py::module_& m) {
    py::register_exception<sim::Error>(m, "Error", PyExc_RuntimeError);
    m.def("set_seed", &sim::set_seed, py::arg("seed"), "Chooses the schedule of the next launches.");
    m.def("set_multiprocessor_count", &sim::set_multiprocessor_count, py::arg("count"));
    m.def(
        "register_buffer",
        [](Address start, size_t bytes, const char* name) { sim::register_global(at(start), bytes, name); },
        py::arg("start"), py::arg("bytes"), py::arg("name"),
        "Once any buffer is registered, kernels must stay inside registered ones.");
    m.def("clear_buffers", &sim::clear_globals);
}
#else
void define_versions(py::module_& m) {
    m.def(
        "cuda_versions",
        [] {
            const CudaVersions versions = cuda_versions();
            return py::make_tuple(versions.runtime, versions.driver);
        },
        "(of the runtime that the kernels were built with, of the driver): 12040 is 12.4, 0 no driver.");
}
#endif

}  // namespace

PYBIND11_MODULE(MAGIHUMAN_MODULE, m) {
    define_products(m);
    define_attention(m);
    define_rows(m);
    define_sampler(m);
    define_convolutions(m);
#if defined(MAGIHUMAN_SIM)
    define_simulator(m);
#else
    define_versions(m);
#endif
}
