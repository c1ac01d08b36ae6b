//! mimalloc as the binaries use it. Crate `mimalloc` asks for every block by its alignment. Where no block of the very size is at hand,
//! mimalloc then takes `size + alignment - 1` bytes, often of the next size class, and one that it has to search for; but what it
//! gives without being asked is aligned for all but a few types already.

use std::alloc::{GlobalAlloc, Layout};

use libmimalloc_sys::{
    mi_free, mi_malloc, mi_malloc_aligned, mi_realloc, mi_realloc_aligned, mi_zalloc, mi_zalloc_aligned,
};

/// Alignment of every block of at least so many bytes (`MI_MAX_ALIGN_SIZE`); a smaller one is aligned to the largest power of two in its
/// size.
const ALIGNED: usize = 16;

pub struct Allocator;

/// Is the block aligned without asking for it?
const fn is_plain(align: usize, size: usize) -> bool {
    align <= ALIGNED && align <= size
}

// SAFETY: blocks come from mimalloc and go back to it, each of at least the size and alignment that was asked for.
unsafe impl GlobalAlloc for Allocator {
    #[inline]
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let (size, align) = (layout.size(), layout.align());
        unsafe { if is_plain(align, size) { mi_malloc(size) } else { mi_malloc_aligned(size, align) } }.cast()
    }

    #[inline]
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        let (size, align) = (layout.size(), layout.align());
        unsafe { if is_plain(align, size) { mi_zalloc(size) } else { mi_zalloc_aligned(size, align) } }.cast()
    }

    #[inline]
    unsafe fn dealloc(&self, block: *mut u8, _: Layout) {
        unsafe { mi_free(block.cast()) }
    }

    #[inline]
    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        let (block, align) = (block.cast(), layout.align());
        unsafe { if is_plain(align, size) { mi_realloc(block, size) } else { mi_realloc_aligned(block, size, align) } }
            .cast()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[global_allocator]
    static ALLOCATOR: Allocator = Allocator;

    #[test]
    fn every_block_is_aligned_and_keeps_what_is_in_it() {
        for align in (0..13).map(|bits| 1usize << bits) {
            let layout = |size| Layout::from_size_align(size, align).expect("a power of two");
            for size in (1..200).chain([255, 256, 320, 1_000, 1_024, 5_000, 70_000, 3_000_000]) {
                // Two at a time, so that not each is the first of its page.
                let blocks = [(); 2].map(|()| unsafe { ALLOCATOR.alloc_zeroed(layout(size)) });
                for block in blocks {
                    assert!((block as usize).is_multiple_of(align), "{size} bytes at {block:p}, asked for {align}");
                    unsafe {
                        assert_eq!((*block, *block.add(size - 1)), (0, 0));
                        *block.add(size - 1) = 7;
                        let grown = ALLOCATOR.realloc(block, layout(size), 2 * size);
                        assert!(
                            (grown as usize).is_multiple_of(align),
                            "{size} bytes grown at {grown:p}, asked for {align}"
                        );
                        assert_eq!(*grown.add(size - 1), 7);
                        ALLOCATOR.dealloc(grown, layout(2 * size));
                    }
                }
            }
        }
    }
}
