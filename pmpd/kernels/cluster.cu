// Blocks of a cluster, which write to each other's shared memory: first part of every program of this folder. CLUSTER (-D): the most blocks
// of one, 1 below compute capability 9.0, where there are none. Nothing is included: NVRTC comes without CUDA's headers.

typedef unsigned long long u64;
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;

__device__ __forceinline__ u32 shared_address(const void* p) { return u32(__cvta_generic_to_shared(p)); }

__device__ __forceinline__ u32 cluster_rank() {
    u32 rank = 0;
#if CLUSTER > 1
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
    return rank;
}
__device__ __forceinline__ u32 cluster_size() {
    u32 size = 1;
#if CLUSTER > 1
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
#endif
    return size;
}
__device__ __forceinline__ void cluster_arrive() {  // orders nothing: the inbox has a fence of its own
#if CLUSTER > 1
    asm volatile("barrier.cluster.arrive.relaxed.aligned;");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if CLUSTER > 1
    asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#endif
}
// What other blocks of the cluster send to this one: a barrier in shared memory counts the bytes as they arrive, so there is
// nothing to wait for but these. (The release of the cluster's own barrier is a fence for the whole GPU.)
struct Inbox {
    u32 barrier;

    // By one thread, before its cluster_arrive.
    __device__ __forceinline__ void open(u32 bytes) const {
#if CLUSTER > 1
        asm volatile("mbarrier.init.shared.b64 [%0], 1; fence.mbarrier_init.release.cluster;" ::"r"(barrier) : "memory");
        asm volatile("{ .reg .b64 state; mbarrier.arrive.expect_tx.shared.b64 state, [%0], %1; }" ::"r"(barrier), "r"(bytes) : "memory");
#endif
    }
    // To where block `rank`, whose inbox is open, has its `to`. Four at a time, as fewer stores take less time.
    __device__ __forceinline__ void send(const float* to, const float (&values)[4], u32 rank) const {
#if CLUSTER > 1
        asm volatile("{ .reg .u32 there, inbox; mapa.shared::cluster.u32 there, %0, %2; mapa.shared::cluster.u32 inbox, %1, %2;"
                     "  st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [there], {%3, %4, %5, %6}, [inbox]; }"
                     ::"r"(shared_address(to)), "r"(barrier), "r"(rank), "f"(values[0]), "f"(values[1]), "f"(values[2]), "f"(values[3])
                     : "memory");
#endif
    }
    __device__ __forceinline__ void send(const float* to, float value, u32 rank) const {
#if CLUSTER > 1
        asm volatile("{ .reg .u32 there, inbox; mapa.shared::cluster.u32 there, %0, %2; mapa.shared::cluster.u32 inbox, %1, %2;"
                     "  st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [there], %3, [inbox]; }"
                     ::"r"(shared_address(to)), "r"(barrier), "r"(rank), "f"(value) : "memory");
#endif
    }
    // Acquires for the block alone, which is the default: what arrives is in its own shared memory, with no cache before it.
    __device__ __forceinline__ void wait() const {
#if CLUSTER > 1
        asm volatile("{ .reg .pred here; AGAIN: mbarrier.try_wait.parity.shared.b64 here, [%0], 0; @!here bra AGAIN; }"
                     ::"r"(barrier) : "memory");
#endif
    }
};
