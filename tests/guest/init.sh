#!/bin/busybox sh
# The guest: mounts its disks and writes files, each synced and then acknowledged on ttyS1.
# The kernel's command line names the disks: "disks=vda,sda".
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
while read -r module; do insmod "$module"; done </modules
stty -F /dev/ttyS1 raw -echo
exec </dev/ttyS1 >/dev/ttyS1
echo  # what a reset has cut off ends here
count=0
for disk in $(echo "$disks" | tr , ' '); do
    until [ -b "/dev/$disk" ]; do usleep 10000; done
    mkdir -p "/mnt/$count"
    mount -t ext4 "/dev/$disk" "/mnt/$count" || { echo "failed mount"; poweroff -f; }
    count=$((count + 1))
done

# Slot n % 256 gets between 4 and 64 KiB of noise, on the disks in turn; the acknowledgement
# follows the fsync, and the next write follows the acknowledgement.
write_on() {
    n=0
    while [ ! -e /stop ]; do
        file=/mnt/$((n % count))/$((n % 256))
        dd if=/dev/urandom of=/tmp/noise bs=4096 count=$((n * 7 % 16 + 1)) 2>/dev/null
        sum=$(md5sum </tmp/noise)
        if ! dd if=/tmp/noise of=$file bs=65536 conv=fsync 2>/dev/null; then
            echo "failed write $n"
            return
        fi
        echo "ack $n ${sum%% *}"
        n=$((n + 1))
    done
}

echo "ready"
while read -r order; do
    case $order in
    write) write_on & ;;
    agent)
        for port in /sys/class/virtio-ports/*; do
            [ "$(cat "$port/name")" = org.qemu.guest_agent.0 ] || continue
            qemu-ga -m virtio-serial -p "/dev/${port##*/}" -t /run >/dev/ttyS0 2>&1 &
        done
        ;;
    count*)  # in place, so that it is on the disk itself when it is acknowledged
        for disk in /mnt/*; do
            printf '%08d' "${order#count }" | dd of="$disk/count" conv=notrunc,fsync 2>/dev/null
        done
        echo "counted ${order#count }"
        ;;
    tell) echo "counts" $(for disk in /mnt/*; do echo "$(cat "$disk/count")"; done) ;;
    spin*)  # as much work as 20 writes, on no disk
        for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
            dd if=/dev/urandom of=/tmp/spin bs=4096 count=16 2>/dev/null
            md5sum </tmp/spin >/dev/null
        done
        echo "spun ${order#spin }"
        ;;
    stop)
        touch /stop
        wait %1
        umount /mnt/* && echo "unmounted"
        poweroff -f
        ;;
    esac
done
